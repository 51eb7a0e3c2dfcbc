"""A run that diverges goes back to its last good checkpoint, or stops with a message."""

import re
from contextlib import nullcontext

import pytest
import torch

from tests.shared.disturbed_runs import assert_same, checkpoint, metrics, names, seen, state
from trainers.distributed.trained_weights import trainable_parameters
from trainers.errors import RunFailedError
from trainers.run import resume, run
from trainers.training.checkpoint import read_checkpoint


@pytest.fixture
def back(monkeypatch):
    """A list of where the run had to go back to, or before."""
    generated = []

    def noting(*arguments, before_step=None):
        generated.extend([] if before_step is None else [before_step])
        return resume(*arguments, before_step=before_step)

    monkeypatch.setattr("trainers.run.resume", noting)
    return generated


LONG = ("train.max_train_steps=12", "train.max_skipped_steps=3")


@pytest.mark.parametrize(
    ("stop", "times"),
    [
        (None, 1),
        pytest.param(9, 1, marks=pytest.mark.slow),
        (None, 2),
        pytest.param(6, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_diverges_goes_back_and_on_at_half_the_rate(
    make, finished, photos, disturb, back, warning_text, monkeypatch, stop, times
):
    """Also when it is killed in step `stop`. Step 8's checkpoint is left behind: its weights led to
    the bad steps."""
    settings, stops = make(*LONG), [stop]

    def nan(step, player):
        if back and step in stops:
            stops.clear()
            raise KeyboardInterrupt
        return step >= 8 and len(back) < times

    disturb(nan=nan)
    with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        run(settings)
    run(settings)
    assert back == [8] * times
    pictures = ", ".join(seen(photos, 10))
    assert (
        f"the last of them step 11: loss of denoiser is not finite, of {pictures}. Back to step "
        f"6, at half the lear" in warning_text()
    )
    generated = [f"step-{step:06d}" for step in (2, 4, 6, 8, 10, 12)]
    assert names(settings) == ["diverged-000008", "diverged-000010", *generated]
    assert metrics(settings, "learning_rate") == {
        n: 1e-2 if n < 7 else 1e-2 / 2**times for n in range(1, 13)
    }
    assert not metrics(settings, "skipped")
    monkeypatch.setattr(
        "trainers.run.make_lr_schedule", lambda *_: lambda step: 1 if step < 6 else 0.5**times
    )
    assert_same(settings, finished(*LONG, f"tracking.project_name=halved{times}"), 12)


def test_checkpoints_of_skipped_steps_do_not_push_out_the_last_good_one(
    make, disturb, back, warning_text
):
    settings = make(
        *LONG, "checkpoint.checkpointing_steps=1", "checkpoint.checkpoints_total_limit=2"
    )
    disturb(nan=lambda step, player: step >= 8 and not back)
    run(settings)
    assert "Back to step 7" in warning_text()


def test_a_run_that_cannot_or_may_not_go_back_stops_with_a_message(make, photos, disturb, back):
    lost, stopped = make(*LONG), make(*LONG, "train.on_divergence=stop")
    disturb(nan=lambda step, player: step >= (8 if back else 0))
    with pytest.raises(
        RunFailedError,
        match=r"^3 steps in .* step 3: .*There is no checkpoint from before that to go",
    ):
        run(lost)
    assert names(lost) == ["diverged-000002"]
    pictures = ", ".join(map(re.escape, seen(photos, 10)))
    wanted = (
        rf"^3 steps in a row .* step 11: .*, of {pictures}\. Lower "
        rf"optimizer.learning_rate.* another output_dir$"
    )
    with pytest.raises(RunFailedError, match=wanted) as error:
        run(stopped)
    assert (error.value.status, back) == (1, [0])
    assert read_checkpoint(checkpoint(stopped, 8))
    state(checkpoint(stopped, 10))


@pytest.mark.parametrize("rank", [3, 2])
def test_a_weight_that_is_not_finite_is_named_and_taken_from_the_checkpoint(
    make, photos, disturb, warning_text, rank
):
    """None of the pictures is at fault, also where there are as many as the weight has rows."""
    settings = make(*LONG, f"lora.rank={rank}")
    name = (
        "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
    )

    def ruin(task):
        trainable_parameters(task.module)[name].data[0] = torch.nan

    disturb({7: ruin})
    run(settings)
    pictures = ", ".join(map(re.escape, seen(photos, 9)))
    assert re.search(
        rf": weight {re.escape(name)} is not finite(, of {pictures})?\. Back to step 6",
        warning_text(),
    )
    state(checkpoint(settings, 12))
