"""A step without a finite loss or gradient changes nothing, and its picture is named."""

import copy
import re

import pytest
import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_leaves

from tests.shared.disturbed_runs import checkpoint, differing, metrics, seen
from trainers.autoencoder import Autoencoder
from trainers.config import OptimizerConfig
from trainers.data.encoder_cache import CachedEncoder
from trainers.gan import Gan
from trainers.run import run
from trainers.training.optimizers import clip_and_step, make_optimizer


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_clipped_step_is_torch_s_and_one_without_a_finite_gradient_changes_nothing(name):
    accelerator, settings, pairs = (
        Accelerator(cpu=True),
        OptimizerConfig(name=name, weight_decay=0.1),
        [],
    )
    for _ in range(2):
        ws = [torch.nn.Parameter(torch.linspace(-1, 1, n).reshape(-1, 8)) for n in (512, 64, 2**16)]
        pairs.append(
            (
                ws,
                make_optimizer(
                    settings, [{"params": [*ws, torch.nn.Parameter(torch.ones(3))], "lr": 0.1}]
                ),
            )
        )
    (ours, held), (theirs, plain) = pairs
    for factor in (1.0, torch.nan, 1e-4, torch.inf, torch.nan, 0.0, 30.0):
        for w, v in zip(ours, theirs, strict=True):
            w.grad, v.grad = factor * w.detach() * 2, factor * v.detach() * 2
        before = copy.deepcopy([ours, held.state_dict()["state"]])
        norm, skipped = clip_and_step(held, torch.zeros(()), 1.0, accelerator)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, equal_nan=True)
        assert skipped == (not expected.isfinite())
        assert not any(w.grad is not None for w in ours)
        if expected.isfinite():
            plain.step()
        after = tree_leaves([ours, held.state_dict()["state"]])
        if skipped:
            for a, b in zip(after, tree_leaves(before), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        elif name == "adamw":  # eight bits round
            for a, b in zip(after, tree_leaves([theirs, plain.state_dict()["state"]]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_a_step_without_a_finite_loss_is_skipped_to_the_bit(
    make, photos, disturb, warning_text, optimizer
):
    settings = make(f"optimizer.name={optimizer}", "checkpoint.checkpointing_steps=1")
    disturb(nan=lambda step, player: step == 2)
    run(settings)
    wanted = (
        "step 3 was skipped, because its gradient is not finite (1 skipped so far): loss "
        "of denoiser is not finite, of "
    )
    assert wanted + ", ".join(seen(photos, 2)) in warning_text().splitlines()
    changed = [
        bool(differing(checkpoint(settings, n), checkpoint(settings, n + 1))) for n in range(1, 6)
    ]
    assert changed == [True, False, True, True, True]
    assert metrics(settings, "skipped") == {3: 1}
    assert metrics(settings).keys() == {1, 2, 4, 5, 6}
    assert metrics(settings, "learning_rate").keys() == {1, 2, 3, 4, 5, 6}


def test_the_logged_loss_is_the_mean_of_the_steps_that_were_not_skipped(make, finished, disturb):
    settings = make("tracking.log_every=3")
    disturb(nan=lambda step, player: step == 2)
    run(settings)
    assert metrics(settings, "skipped") == {3: pytest.approx(1 / 3)}
    assert metrics(settings)[3] == pytest.approx(
        (metrics(finished())[1] + metrics(finished())[2]) / 2, rel=1e-6
    )


@pytest.mark.parametrize(
    "bad", ["autoencoder", "discriminator", "generator", "generator discriminator"]
)
def test_only_the_player_without_a_finite_loss_is_held(make, disturb, warning_text, bad):
    kind, bad = "autoencoder" if bad == "autoencoder" else "gan", set(bad.split())
    settings = make("checkpoint.checkpointing_steps=1", "train.train_batch_size=4", kind=kind)
    disturb(
        nan=lambda step, player: step == 2 and player in bad,
        task=Autoencoder if kind == "autoencoder" else Gan,
    )
    run(settings)
    assert re.search(
        rf"step 3 was skipped, .*: loss of ({'|'.join(bad)}) is not finite", warning_text()
    )
    changed = differing(checkpoint(settings, 2), checkpoint(settings, 3))
    players = {"autoencoder"} if kind == "autoencoder" else {"generator", "discriminator"}
    assert {name.split(".")[0] for name in changed} == players - bad
    assert metrics(settings, "skipped") == {3: 1}


def test_a_picture_that_is_not_finite_is_named_and_no_other(
    make, photos, warning_text, monkeypatch
):
    plain, settings, bad = CachedEncoder.moments, make(), f"{photos}/3.png"

    def spoilt(self, picture, crop):
        return plain(self, picture, crop) * (torch.nan if picture.name == bad else 1)

    monkeypatch.setattr(CachedEncoder, "moments", spoilt)
    run(settings)
    steps = [step + 1 for step in range(6) if bad in seen(photos, step)]
    assert list(metrics(settings, "skipped")) == steps
    assert (
        len(steps)
        == len(re.findall(rf": moments is not finite, of {bad}$", warning_text(), re.MULTILINE))
        > 1
    )
