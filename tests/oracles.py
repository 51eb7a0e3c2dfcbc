"""Checks that tests of several trainers make."""

import torch


def check_each_players_step(task, steps, expected, rtol, atol):
    """Each player in turn has the loss `expected(name)` and its gradients, then steps before the next one is asked.

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
