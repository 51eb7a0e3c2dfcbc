"""What a GAN makes: labels, sizes, ranges, and that it learns."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageSequence
from torch import nn

from tests.shared.gans import ROWS, build, draws, written
from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.from_scratch.networks import Discriminator, Generator
from trainers.metrics.image_quality import distribution_metrics
from trainers.run import run


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
