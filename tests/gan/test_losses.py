"""A GAN's losses and penalties are those of their papers, and its players keep apart."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tests.shared.gans import build, draws
from tests.shared.oracles import check_each_players_step
from trainers.from_scratch.adversarial import LOSSES
from trainers.from_scratch.networks import Discriminator


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


PAPERS = {
    "non_saturating": (
        lambda r, m: -np.log(sigmoid(r)).mean() - np.log(1 - sigmoid(m)).mean(),
        lambda r, m: -np.log(sigmoid(m)).mean(),
    ),
    "hinge": (
        lambda r, m: np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + m).mean(),
        lambda r, m: -m.mean(),
    ),
    "wasserstein": (lambda r, m: m.mean() - r.mean(), lambda r, m: -m.mean()),
    "relativistic": (
        lambda r, m: -np.log(sigmoid(r - m)).mean(),
        lambda r, m: -np.log(sigmoid(m - r)).mean(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_their_papers(name):
    real, generated = np.random.default_rng(0).normal(0, 2, (2, 50))
    for ours, theirs in zip(LOSSES[name], PAPERS[name], strict=True):
        assert float(ours(torch.tensor(real), torch.tensor(generated))) == pytest.approx(
            theirs(real, generated)
        )


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
@pytest.mark.parametrize("conditional", [False, True])
def test_a_step_is_the_discriminators_then_the_generators_against_the_new_one(
    settings, loss, conditional
):
    """The reference shows each player its pictures apart, and shares only the draws and the
    losses."""
    task, batch = build(
        settings(f"objective.loss={loss}", "objective.r1=0", f"model.conditional={conditional}")
    )
    generator, discriminator = (
        task.players[name].module for name in ("generator", "discriminator")
    )
    x, label = batch["pixels"] / 127.5 - 1, batch["label"]
    generated = generator(draws().normal((6, 4)), label)

    def expected(player):
        return LOSSES[loss][player](discriminator(x, label), discriminator(generated, label))

    before = [p.clone() for p in discriminator.parameters()]
    references = {"discriminator": partial(expected, 0), "generator": partial(expected, 1)}
    check_each_players_step(task, task.losses(batch, draws()), references, rtol=1e-4, atol=1e-6)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, discriminator.parameters(), strict=True)
    )


def test_neither_players_step_reaches_into_the_other(settings):
    task, batch = build(settings("objective.r1=1", "objective.r2=1", "model.spectral_norm=true"))
    generator, discriminator = (
        task.players[name].module for name in ("generator", "discriminator")
    )
    steps = task.losses(batch, draws())
    next(steps)[1].backward()
    assert all(p.grad is None for p in generator.parameters())
    kept = [(p.clone(), p.grad.clone()) for p in discriminator.parameters()]
    next(steps)[1].backward()
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())
    task.players["generator"].optimizer.step()
    for parameter, (value, gradient) in zip(discriminator.parameters(), kept, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)
    assert next(steps, None) is None
    assert all(p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize("every", [1, 3])
def test_the_generator_steps_once_in_so_many_steps(settings, every):
    task, batch = build(settings(f"objective.generator_every={every}"))
    counts = [len(list(task.losses(batch, draws(step)))) for step in range(6)]
    assert counts == [2 if step % every == 0 else 1 for step in range(6)]


def slopes(critic, x, label):
    """Of each picture's score by that picture, one by one."""
    for i in range(len(x)):
        one = x[i : i + 1].detach().requires_grad_()
        yield torch.autograd.grad(critic(one, label[i : i + 1]).squeeze(), one, create_graph=True)[
            0
        ]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("kind", ["r1", "r2", "gradient_penalty"])
def test_penalties_are_those_of_their_papers_and_lazy(settings, kind, every):
    weights = {name: 0.7 if name == kind else 0 for name in ("r1", "r2", "gradient_penalty")}
    lines = [f"objective.{name}={value}" for name, value in weights.items()]
    task, batch = build(
        settings(*lines, f"objective.penalty_every={every}", "model.conditional=true")
    )
    critic, label = task.players["discriminator"].module, batch["label"]
    x, generated = (
        batch["pixels"] / 127.5 - 1,
        torch.rand(6, 1, 28, 28, generator=torch.manual_seed(0)) * 2 - 1,
    )
    share = draws(4).uniform()[:, None, None, None]
    at = {"r1": x, "r2": generated, "gradient_penalty": (1 - share) * x + share * generated}[kind]
    squares = torch.stack([slope.square().sum() for slope in slopes(critic, at, label)])
    expected = {"gradient_penalty": 0.7 * ((squares.sqrt() - 1) ** 2).mean()}.get(
        kind, 0.7 / 2 * squares.mean()
    )
    ours = task.lazy_regularization(x, generated, label, draws(4))
    torch.testing.assert_close(ours, every * expected)
    first = next(critic.parameters())
    gradients = (torch.autograd.grad(loss, first)[0] for loss in (ours, every * expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert [
        step
        for step in range(9)
        if torch.is_tensor(task.lazy_regularization(x, generated, label, draws(step)))
    ] == [*range(0, 9, every)]


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_spectral_norm_holds_every_layer_at_one(architecture):
    torch.manual_seed(0)
    critic = Discriminator(architecture, 1, 28, 8, classes=3, spectral=True)
    optimizer, label = torch.optim.Adam(critic.parameters(), 1e-2), torch.arange(6) % 3
    for i in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if i < 10 else 0
        optimizer.zero_grad()
        critic(torch.randn(6, 1, 28, 28), label).square().mean().backward()
        optimizer.step()
    layers = [
        module
        for module in critic.modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding)
    ]
    assert len(layers) == {"dcgan": 4, "resnet": 8}[architecture]
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        torch.testing.assert_close(norm, torch.tensor(1.0), rtol=0, atol=0.01)


def test_a_batch_of_equal_pictures_has_a_finite_diversity(settings):
    """Three pictures in batches of two: the last of an epoch may be the first of the next."""
    task, batch = build(settings())
    next(task.losses(batch | {"pixels": batch["pixels"][:1].expand(6, 1, 28, 28)}, draws()))
    assert torch.isfinite(task.balance_metrics["diversity"]), (
        "the log takes it for divergence and ends the run"
    )


def test_diversity_is_the_spread_of_generated_pictures_over_that_of_real_ones(settings):
    task, batch = build(settings())
    next(task.losses(batch, draws()))
    varied = task.balance_metrics["diversity"]
    equal = batch | {"pixels": batch["pixels"][:1].expand(6, 1, 28, 28)}
    next(task.losses(equal, draws()))
    # the generated pictures are the same, and nothing is less varied than equal pictures
    assert task.balance_metrics["diversity"] > 100 * varied
