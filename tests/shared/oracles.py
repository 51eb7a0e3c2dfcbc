"""Checks that tests of several trainers make."""

import torch


def check_each_players_step(task, steps, expected, rtol, atol):
    """Each player in turn has the loss `expected(name)` and its gradients, then steps before the
    next one is asked.

    expected: the loss of a player as the papers write it, in the order in which they step.
    """
    for name, reference in expected.items():
        named, ours = next(steps)
        module = task.players[name].module
        wanted = torch.autograd.grad(reference(), list(module.parameters()), retain_graph=True)
        ours.backward()
        assert named == name
        torch.testing.assert_close(ours, reference())
        for parameter, gradient in zip(module.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=rtol, atol=atol)
        task.players[name].optimizer.step()
    assert next(steps, None) is None


def assert_trained_alike(losses, weights, rate):
    """Check two trainings, each a pair, that differ only by the order in which float32 is summed.

    A sum of n products is off by about sqrt(n) * 6e-8 of its size, 1e-5 for the longest sums here,
    and after a few steps the loss by ten times that. Adam divides a gradient by its own size: one
    that is mostly rounding moves its weight by any share of `rate`, on another processor by another
    share. So a few weights, one of 500, may differ by up to twice the rate, to which every step may
    add, and all others by a fiftieth of it. A training that really differs moves them all.
    """
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    one, other = weights
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    first, second = (torch.cat([part[name].flatten() for name in one]) for part in (one, other))
    difference = (first - second).abs()
    is_apart = difference > rate / 50 + 1e-3 * second.abs()
    assert is_apart.float().mean() <= 1 / 500
    assert difference.max() <= 2 * rate
