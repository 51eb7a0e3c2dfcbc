"""Progress suits its place: a bar on a terminal, whole lines with the time elsewhere."""

import os
import pty
import re
import select
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from trainers import progress
from trainers.config import Config
from trainers.config.base_sections import TrackingConfig, TrainConfig
from trainers.training import callbacks
from trainers.training.callbacks import LogMetrics
from trainers.training.progress import name_losses
from trainers.training.status import MAX_WARNINGS, recorded_warnings

VALUES = {"learning_rate": 1e-3, "images_per_second": 8.0, "peak_memory_gib": 1.5}
LINE = (
    r"\d\d:\d\d:\d\d  step (\d+)/6  loss 0\.5000  lr 1\.0e-04  [\d.]+ images/s  [\d.]+ GiB  "
    r"[\d.e+]+ steps/s  \d:\d\d:\d\d left"
)


def make_log(tmp_path):
    """The log of a run of six steps, each third of which is told."""
    config = Config(
        output_dir=tmp_path,
        train=TrainConfig(max_train_steps=6),
        tracking=TrackingConfig(log_every=3, report_to=[]),
    )
    return LogMetrics(config, Accelerator(cpu=True), lambda step: 1.0, start=0)


def log_step(log, step):
    log(step, {"denoiser_loss": torch.tensor(0.5), "skipped": torch.tensor(0.0)})


def log_steps(tmp_path):
    log = make_log(tmp_path)
    for step in range(1, 7):
        log_step(log, step)
    log.progress.close()


@contextmanager
def terminal(monkeypatch):
    """Inside, stderr is a terminal; gives a function that reads what was written to it."""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)

        def written():
            stream.flush()
            found = b""
            # a terminal hands on what it has, which need not be all yet
            while select.select([leader], [], [], 0.5)[0]:
                found += os.read(leader, 2**16)
            return found.decode()

        yield written
    os.close(leader)


def test_without_a_terminal_each_log_interval_is_one_line(tmp_path, capsys):
    log_steps(tmp_path)
    written = capsys.readouterr().err
    assert "\r" not in written
    assert [re.fullmatch(LINE, line)[1] for line in written.splitlines()] == ["3", "6"]
    assert written.splitlines()[-1].endswith("0:00:00 left")


def test_on_a_terminal_a_bar_shows_the_loss_whatever_the_width(tmp_path, monkeypatch):
    """The terminal of this test does not know its width, as those of some containers."""
    with terminal(monkeypatch) as read:
        log_steps(tmp_path)
        written = read()
    assert "\r" in written
    assert "6/6" in written
    assert "loss 0.5" in written
    assert "denoiser" not in written


def test_the_bar_moves_with_each_step_and_reads_nothing_between_the_logs(tmp_path, monkeypatch):
    moved, read = [], []
    log = make_log(tmp_path)
    monkeypatch.setattr(log.progress, "step", lambda: moved.append(1))
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: read.append(len(moved)) or item(x))
    for step in range(1, 7):
        log_step(log, step)
        assert len(moved) == step
    assert set(read) == {3, 6}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"denoiser_loss": 1.0}, {"loss": 1.0}),
        ({"net_loss": 1.0, "held_out_loss": 2.0}, {"loss": 1.0, "held-out loss": 2.0}),
        (
            {"generator_loss": 1.0, "discriminator_loss": 2.0, "net_grad_norm": 3.0},
            {"generator": 1.0, "discriminator": 2.0},
        ),
    ],
)
def test_the_loss_of_a_single_player_is_called_the_loss(values, named):
    assert name_losses(VALUES | values) == named


def test_work_without_a_terminal_tells_of_itself_only_when_it_takes_long(monkeypatch, capsys):
    assert list(progress.track(range(3), "encoding")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress.track(range(5), "encoding")) == [0, 1, 2, 3, 4]
    told = [line.split("  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "encoding: 2 of 5 in 0:00:40, about 0:01:00 left",
        "encoding: 4 of 5 in 0:01:20, about 0:00:20 left",
        "encoding: 5 of 5 in 0:01:40",
    ]


def test_warnings_are_shown_and_the_newest_are_kept_once():
    numbers = [*range(9), 8]
    with warnings.catch_warnings(record=True) as shown, recorded_warnings() as kept:
        warnings.simplefilter("always")
        for number in numbers:
            warnings.warn(f"the disk\n is slow {number}", stacklevel=1)
    assert len(shown) == 10
    assert list(kept) == [f"the disk is slow {number}" for number in range(9 - MAX_WARNINGS, 9)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_every_tracker_gets_the_samples(name, tmp_path, monkeypatch):
    """Each name that the config takes; trackio's pictures go through its own `log`."""
    got = []
    tracker = SimpleNamespace(
        name=name,
        log_images=lambda values, step, **options: got.append((values["samples"][0], step)),
        log=lambda values, step: got.append((values["samples"], step)),
    )
    fake = {"trackio": SimpleNamespace(Image=lambda picture: picture)}
    monkeypatch.setattr(callbacks, "import_module", fake.get)
    Image.new("RGBA", (6, 4), "red").save(tmp_path / "grid.png")
    callbacks.log_pictures(SimpleNamespace(trackers=[tracker]), tmp_path, 7)
    ((picture, step),) = got
    assert step == 7
    assert np.array_equal(picture, np.full((4, 6, 3), (255, 0, 0)))
