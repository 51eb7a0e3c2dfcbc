"""A GAN's losses and penalties are those of their papers, players keep apart, and the figures equal
closed forms."""

import shutil
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from oracles import check_each_players_step
from PIL import Image, ImageSequence
from scipy.linalg import sqrtm
from torch import nn

from trainers import gan
from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.from_scratch.adversarial import LOSSES
from trainers.from_scratch.augment import differentiable_augment
from trainers.from_scratch.balance import WatchBalance, class_balance
from trainers.from_scratch.classifier import train_classifier
from trainers.from_scratch.networks import Discriminator, Generator
from trainers.gan import Gan
from trainers.metrics.image_quality import coverage, distribution_metrics
from trainers.run import run

ROWS = range(6)


@pytest.fixture
def settings(bars, tmp_path):
    """A function: overrides -> Config of a short run."""
    path = written(bars, tmp_path)
    return lambda *overrides: loading.load_config(path, overrides)


def written(bars, folder):
    path = folder / "config.yaml"
    path.write_text(
        f"""
kind: gan
output_dir: {folder}/run
model: {{latent_dim: 4, width: 8}}
data: {{dataset_name: {bars}, label_column: label, test_split: null, resolution: 28}}
train: {{max_train_steps: 4, train_batch_size: 6}}
tracking: {{report_to: [], log_every: 4}}
"""
    )
    return path


def build(settings):
    """The task, and its first batch."""
    task, batches, _ = Gan.build(settings, Accelerator(cpu=True))
    (batch, _), *_ = batches(0)
    return task, batch


def draws(step=0):
    return SampleRng(0, step, ROWS)


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


KINDS = ("color", "translation", "cutout")


def changed(x, *kinds):
    return differentiable_augment(x, kinds, SampleRng(0, 0, range(len(x))))


def pictures(n=40, channels=3, size=16):
    return torch.rand(n, channels, size, size, generator=torch.manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_what_the_discriminator_sees_depends_on_the_rows_draws_alone_and_lets_gradients_through(
    kinds,
):
    x, step = pictures(4), torch.randn(4, 3, 16, 16)
    y = changed(x, *kinds)
    assert y.shape == x.shape
    assert not torch.equal(x, y)
    assert torch.equal(y, changed(x, *kinds))
    torch.testing.assert_close(differentiable_augment(x[2:3], kinds, SampleRng(0, 0, [2])), y[2:3])
    _, slope = torch.autograd.functional.jvp(lambda x: changed(x, *kinds), x, step)
    torch.testing.assert_close(
        slope, changed(x + step, *kinds) - y, rtol=1e-3, atol=1e-5
    )  # for it is affine


def test_without_a_kind_nothing_is_changed():
    assert torch.equal(changed(pictures()), pictures())


def test_translation_moves_whole_pixels_and_pads_with_nothing():
    x, shifts = pictures(60), []
    for before, after in zip(x, changed(x, "translation"), strict=True):
        wide = nn.functional.pad(before, (2, 2, 2, 2))
        moved = {(i, j): wide[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)}
        found = [at for at, picture in moved.items() if torch.allclose(picture, after, atol=1e-4)]
        assert len(found) == 1
        shifts += found
    assert len(set(shifts)) > 15  # of 25


def test_cutout_hides_one_rectangle_of_at_most_half_the_side_and_nothing_else():
    x = pictures(60) + 5
    areas = []
    for before, after in zip(x, changed(x, "cutout"), strict=True):
        hidden = (after == 0).all(0)
        assert torch.equal(after[:, ~hidden], before[:, ~hidden])
        rows, columns = hidden.any(1).sum(), hidden.any(0).sum()
        assert hidden.sum() == rows * columns
        assert max(rows, columns) <= 8
        areas.append(int(hidden.sum()))
    assert max(areas) > 40


def test_colour_moves_brightness_contrast_and_saturation_within_their_ranges():
    flat = torch.zeros(200, 3, 16, 16)
    shift = changed(flat, "color")[:, 0, 0, 0]
    torch.testing.assert_close(changed(flat, "color"), shift[:, None, None, None].expand_as(flat))
    assert -0.5 <= shift.min() < -0.4
    assert 0.4 < shift.max() <= 0.5
    gray = pictures(1, 1).expand(200, 3, 16, 16)
    contrast = changed(gray, "color").std((1, 2, 3)) / gray.std((1, 2, 3))
    assert 0.5 <= contrast.min() < 0.6
    assert 1.4 < contrast.max() <= 1.5
    x = pictures(200)
    y = changed(x, "color")
    spread = (y - y.mean(1, keepdim=True)).std((1, 2, 3)) / (x - x.mean(1, keepdim=True)).std(
        (1, 2, 3)
    )
    light = y.mean(1).std((1, 2)) / x.mean(1).std((1, 2))  # the contrast
    saturation = spread / light
    assert 0 <= saturation.min() < 0.1
    assert 1.9 < saturation.max() <= 2.001


class Points(nn.Module):
    """Pictures (N, D, 1, 1) are their own features."""

    def forward(self, x):
        return x.flatten(1)


def points(mean=0.0, scale=1.0, n=300, seed=0):
    return mean + scale * torch.randn(n, 5, 1, 1, generator=torch.Generator().manual_seed(seed))


def test_equal_sets_have_no_distance_and_cover_each_other():
    metrics = distribution_metrics(points(), points(), Points())
    assert metrics["fid"] == pytest.approx(0, abs=1e-4)
    assert metrics["kid"] == pytest.approx(0, abs=0.1)
    assert (metrics["precision"], metrics["recall"]) == (1, 1)


def test_fid_and_kid_equal_their_closed_forms():
    generated, true = points(0.3, 1.2), points(seed=1) @ torch.eye(1)
    metrics = distribution_metrics(generated, true, Points())
    a, b = (x.flatten(1).double().numpy() for x in (generated, true))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    fid = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert metrics["fid"] == pytest.approx(fid, rel=1e-4)
    aa, bb, ab = ((x @ y.T / 5 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n = len(a)
    kid = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (aa, bb)) - 2 * ab.mean()
    assert metrics["kid"] == pytest.approx(kid, rel=1e-3)


def test_what_is_never_made_costs_recall_and_what_does_not_exist_precision():
    one, both = points(), torch.cat([points(seed=1)[:150], points(50, seed=2)[:150]])
    dropped, invented = (
        distribution_metrics(one, both, Points()),
        distribution_metrics(both, one, Points()),
    )
    assert dropped["precision"] > 0.9
    assert dropped["recall"] < 0.6
    assert (invented["precision"], invented["recall"]) == pytest.approx(
        (dropped["recall"], dropped["precision"])
    )
    assert distribution_metrics(one, points(50, seed=2), Points())["precision"] == 0


@pytest.mark.parametrize("k", [1, 3])
def test_inside_equals_a_search_by_hand(k):
    a, b = points(0.8, n=90).flatten(1), points(seed=1, n=110).flatten(1)
    distance = np.linalg.norm(b[:, None].numpy() - b[None].numpy(), axis=-1)
    radius = np.sort(distance, axis=1)[:, k]  # the 0th is the point itself
    hits = [
        any(np.linalg.norm(p - q) <= r for q, r in zip(b.numpy(), radius, strict=True))
        for p in a.numpy()
    ]
    assert coverage(a, b, k) == pytest.approx(np.mean(hits))
    assert 0 < np.mean(hits) < 1


class Levels(nn.Module):
    """A known classifier: a picture's class is its brightness, -1 for class 0 up to 1 for class
    4."""

    config = SimpleNamespace(classes=5)

    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] - torch.linspace(-1, 1, 5)).square()


def test_balance_counts_the_classes_that_are_made():
    counts = [5, 1, 0, 74, 20]
    generated = torch.cat([torch.full((n, 1, 4, 4), -1 + k / 2) for k, n in enumerate(counts)])
    metrics = class_balance(generated[torch.randperm(100)], Levels())
    assert metrics == pytest.approx({"modes": 3, "least_share": 0, "most_share": 0.74 * 5})
    even = class_balance(
        generated.new_tensor([-1, -0.5, 0, 0.5, 1])[:, None, None, None].expand(5, 1, 4, 4),
        Levels(),
    )
    assert even == pytest.approx({"modes": 5, "least_share": 1, "most_share": 1})


class Copier(nn.Module):
    """A generator that knows other pictures of the data set, or only one of them."""

    def __init__(self, pictures):
        super().__init__()
        self.pictures = nn.Parameter(pictures)

    def forward(self, z, label=None):
        return self.pictures


def watched(task, batch, steps=4, start=0):
    """Steps, without training, as the loop would observe them."""
    watch = WatchBalance(task)
    for step in range(start, start + steps):
        list(task.losses(batch, draws(step)))
        watch(step + 1, {})


def test_a_generator_of_one_picture_is_warned_of_and_one_of_all_is_not(settings, recwarn):
    task, batch = build(settings())
    x = batch["pixels"] / 127.5 - 1
    task.players["generator"].module = Copier(x.roll(1, 0))
    watched(task, batch)
    assert not [w for w in recwarn if "mode collapse" in str(w.message)]
    task.players["generator"].module = Copier(x[:1].expand_as(x).clone())
    with pytest.warns(UserWarning, match="mode collapse"):
        watched(task, batch)


def test_a_discriminator_that_wins_is_warned_of(settings, recwarn):
    task, batch = build(settings())
    task.players["generator"].module = Copier(-(batch["pixels"] / 127.5 - 1))
    score = {"won": 1.0, "even": 0.0}
    for name, slope in score.items():
        recwarn.clear()
        task.players["discriminator"].module = partial(
            lambda x, label, slope: -slope * x.mean((1, 2, 3)), slope=slope
        )
        watch = WatchBalance(task)
        for step in range(4):
            next(task.losses(batch, draws(step + 1)))
            watch(step + 1, {})
        assert any("tells 100.0% of the pairs apart" in str(w.message) for w in recwarn) == (
            name == "won"
        )


def test_going_on_between_two_log_lines_is_no_collapse(settings, recwarn):
    task, batch = build(settings())
    task.players["generator"].module = Copier((batch["pixels"] / 127.5 - 1).roll(1, 0))
    watched(task, batch, steps=1, start=3)
    assert not [str(w.message) for w in recwarn if "mode collapse" in str(w.message)]


def test_few_held_out_pictures_do_not_end_a_run_that_has_trained(
    settings, bars, tmp_path, monkeypatch
):
    """An error before training would do as well."""
    monkeypatch.setattr(gan, "train_classifier", partial(train_classifier, steps=1))
    shutil.copytree(bars, tmp_path / "few")
    rows = datasets.Dataset.from_parquet(str(bars / "test.parquet")).select(range(2))
    rows.to_parquet(tmp_path / "few/test.parquet")
    final = settings(f"data.dataset_name={tmp_path}/few", "data.test_split=test")
    try:
        run(final)
    except UserError:
        assert not (final.output_dir / "metrics.jsonl").exists()
    else:
        assert (final.output_dir / "README.md").exists()


def test_a_batch_of_equal_pictures_has_a_finite_diversity(settings):
    """Three pictures in batches of two: the last of an epoch may be the first of the next."""
    task, batch = build(settings())
    next(task.losses(batch | {"pixels": batch["pixels"][:1].expand(6, 1, 28, 28)}, draws()))
    assert torch.isfinite(task.balance_metrics["diversity"]), (
        "the log takes it for divergence and ends the run"
    )


def test_a_conditional_generator_and_discriminator_read_the_label(settings):
    task, batch = build(settings("model.conditional=true"))
    generator, discriminator = (
        task.players[name].module for name in ("generator", "discriminator")
    )
    z, zero, one = (
        draws().normal((6, 4)),
        torch.zeros(6, dtype=torch.long),
        torch.ones(6, dtype=torch.long),
    )
    assert (generator(z, zero) - generator(z, one)).abs().amax((1, 2, 3)).min() > 0
    x = batch["pixels"] / 127.5 - 1
    assert (discriminator(x, zero) - discriminator(x, one)).abs().min() > 0


def test_a_picture_of_the_run_is_the_same_in_any_batch_and_classes_take_turns(settings):
    task, _ = build(settings("model.conditional=true"))
    turns = task.generate(ROWS)
    torch.testing.assert_close(task.generate(range(3, 6)), turns[3:])
    for i in ROWS:
        alone = task.model(SampleRng(0, -1, [i]).normal((1, 4)), torch.tensor([i % 2]))
        torch.testing.assert_close(turns[i : i + 1], alone)


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_both_players_take_every_size_and_pictures_stay_in_range(architecture, size):
    x = Generator(architecture, 3, size, 8, 4, 0)(5 * torch.randn(2, 4))
    assert x.shape == (2, 3, size, size)
    assert x.abs().max() <= 1
    assert Discriminator(architecture, 3, size, 8, 0, False)(x).shape == (2,)


class Coarse(nn.Module):
    """Pictures (N, 1, 28, 28) at 4 x 4 pixels."""

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 7).flatten(1)


@pytest.fixture(scope="module")
def trained(bars, tmp_path_factory):
    """A task before training, and the run folder after it: an upper bar for class 0, a lower one
    for class 1."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("trained")
    more = (
        "model.conditional=true",
        "train.max_train_steps=100",
        "train.train_batch_size=16",
        "train.ema_decay=0.9",
    )
    final = loading.load_config(written(bars, folder), more)
    task, _ = build(final)
    run(final)
    return task, final.output_dir


def test_what_it_makes_comes_nearer_to_the_pictures(trained):
    task, folder = trained
    z, label = torch.randn(120, 4, generator=torch.manual_seed(0)), torch.arange(120) % 2
    true, models = (
        task.train_images.take(range(120)) / 127.5 - 1,
        (task.model, Generator.from_pretrained(folder / "model")),
    )
    with torch.no_grad():
        before, after = (
            distribution_metrics(model(z, label), true, Coarse())["fid"] for model in models
        )
    assert after < before / 3


def test_it_learns_to_make_the_class_that_is_asked_for(trained):
    """Which needs the projection of the label on the features to weigh as much as their score."""
    label, generator = torch.arange(100) % 2, Generator.from_pretrained(trained[1] / "model")
    with torch.no_grad():
        x = generator(torch.randn(100, 4, generator=torch.manual_seed(0)), label)
    lower = x[:, :, 14:].mean((1, 2, 3)) > x[:, :, :14].mean((1, 2, 3))
    assert (lower == label).float().mean() > 0.9


def test_the_walk_goes_round_in_even_steps(trained):
    with Image.open(trained[1] / "samples/final/walk.gif") as walk:
        assert walk.info["loop"] == 0  # without end
        frames = [np.asarray(frame.convert("L"), float) for frame in ImageSequence.Iterator(walk)]
    steps = [np.abs(a - b).mean() for a, b in pairwise([*frames, frames[0]])]
    assert len(frames) > 30
    assert max(steps) < 2.5 * np.median(steps)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.resolution=48"], "data.resolution: must be 28, 32 or 64"),
        (
            ["objective.loss=wasserstein"],
            "objective.gradient_penalty: the wasserstein loss requires",
        ),
        (
            ["model.conditional=true", "data.label_column=null"],
            "model.conditional: requires class labels",
        ),
        (["objective.augment=[colour]"], "objective.augment"),
        (["train.train_batch_size=1"], "train.train_batch_size: must be at least 2"),
    ],
)
def test_mistakes_in_the_config_are_named(settings, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(*overrides)
