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
    """Two trainings, each a pair, that are equal but for the order in which float32 is summed, on
    any processor.

    A sum of n products is off by about sqrt(n) * 6e-8 of its size, 1e-5 for the longest sums here,
    and after a few steps the loss by ten times that. Adam divides a gradient by its own size: one
    that is mostly rounding moves its weight by a share of `rate`, of which a fiftieth is allowed.
    """
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=rate / 50)
