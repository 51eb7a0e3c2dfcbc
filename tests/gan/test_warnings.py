"""A collapsed generator and a discriminator that wins are warned of, and nothing else is."""

import shutil
from functools import partial

import datasets
import pytest
from torch import nn

from tests.shared.gans import build, draws
from trainers import gan
from trainers.errors import UserError
from trainers.from_scratch.balance import WatchBalance
from trainers.from_scratch.classifier import train_classifier
from trainers.run import run


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
