"""DeepSpeed ZeRO-2 and ZeRO-3 train as one plain process does, and share its checkpoints."""

import json
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from tests.shared.deepspeed_runs import assert_alike, half, networks, rows, weights
from tests.shared.runs import PRIOR
from trainers.dreambooth import DreamBooth
from trainers.run import run

pytest.importorskip("deepspeed")
BOTH = pytest.mark.parametrize("stage", [2, 3])
EVERYTHING = (*PRIOR, "validation.prompts=[a b c, x]", "checkpoint.checkpointing_steps=6")


@pytest.fixture
def held(tmp_path):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (20, 20), (40, 215, 90)).save(tmp_path / "held" / "0.png")
    return (f"data.held_out_dir={tmp_path}/held", "validation.validation_steps=3")


@BOTH
@pytest.mark.parametrize("family", ["sd15", pytest.param("flux", marks=pytest.mark.slow)])
def test_two_processes_train_lora_as_one(settings, held, launched, tmp_path, family, stage):
    """With class pictures, held-out photos, samples, the text encoder and the reload proof."""
    more = (
        *EVERYTHING,
        *held,
        "train.gradient_accumulation_steps=2",
        "train.train_text_encoder=true",
        "optimizer.text_encoder_lr=3e-3",
    )
    one = settings(*more, f"output_dir={tmp_path}/one", family=family)
    two = half(settings(*more, f"output_dir={tmp_path}/two", family=family))
    run(one)
    launched(two, stage)
    assert_alike(one, two, "denoiser_grad_norm", "held_out_loss")
    assert len(rows(two, "held_out_loss")) == 2
    for name in ("step-000003/01-0.png", "step-000006/grid.png", "final/grid.png"):
        assert (two.output_dir / "samples" / name).exists()


@pytest.mark.slow
@BOTH
def test_two_processes_train_all_weights_as_one(settings, held, launched, tmp_path, stage):
    more = ("lora=null", "optimizer.learning_rate=1e-3", "optimizer.eps=1e-3", *EVERYTHING, *held)
    one, two = (
        settings(*more, f"output_dir={tmp_path}/one"),
        half(settings(*more, f"output_dir={tmp_path}/two")),
    )
    run(one)
    launched(two, stage)
    assert_alike(one, two, "denoiser_grad_norm", "held_out_loss")


def test_two_processes_train_an_autoencoder_as_one(bars, launched, tmp_path):
    more = ("model.variational=true", "train.ema_decay=0.9", "data.label_column=label")
    one = networks(bars, tmp_path, "autoencoder", *more, f"output_dir={tmp_path}/one")
    two = half(networks(bars, tmp_path, "autoencoder", *more, f"output_dir={tmp_path}/two"))
    run(one)
    launched(two, 2)
    assert_alike(one, two, "autoencoder_grad_norm")
    metrics = [json.loads((run.output_dir / "figures.json").read_text()) for run in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)


@BOTH
@pytest.mark.parametrize("first", ["plain", "deepspeed"])
def test_three_steps_on_two_processes_and_three_on_one_equal_six(
    settings, launched, tmp_path, first, stage
):
    """And three on one, then three on two. One learning rate for each of two groups of
    parameters."""
    more = (
        "train.train_text_encoder=true",
        "optimizer.text_encoder_lr=3e-3",
        "checkpoint.checkpointing_steps=3",
    )
    whole = settings(*more, f"output_dir={tmp_path}/whole")
    parts = settings(*more, f"output_dir={tmp_path}/parts")
    run(whole)
    short = parts.model_copy(
        update={"train": parts.train.model_copy(update={"max_train_steps": 3})}
    )
    if first == "plain":
        run(short)
        assert "resumed from" in launched(half(parts), stage, kept=0)[0]
    else:
        launched(half(short), stage, kept=0)
        run(parts)
    assert_alike(whole, parts)
    ours, theirs = (
        torch.load(run.output_dir / "checkpoints/step-000006/denoiser.optimizer.pt")
        for run in (whole, parts)
    )
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in ours["state"].items():
        torch.testing.assert_close(theirs["state"][i], state, rtol=1e-3, atol=1e-5)


def spoil(rank=None):
    """The loss of the third step is no number, in one of the processes or in all."""
    sound = DreamBooth.losses

    def losses(task, batch, rng):
        for name, loss in sound(task, batch, rng):
            here = rng.step == 2 and rank in (None, task.accelerator.process_index)
            yield name, loss * float("nan") if here else loss

    DreamBooth.losses = losses


@BOTH
def test_a_step_whose_loss_is_no_number_in_one_process_is_skipped_in_both(
    settings, launched, tmp_path, monkeypatch, stage
):
    once = ("checkpoint.checkpointing_steps=6", "train.max_train_steps=4")
    one, two = (
        settings(*once, f"output_dir={tmp_path}/one"),
        half(settings(*once, f"output_dir={tmp_path}/two")),
    )
    printed = launched(two, stage, before=partial(spoil, 1))
    assert (
        "step 3 was skipped, because its gradient is not finite (1 skipped so far): loss of "
        "denoiser" in printed[1]
    )
    assert rows(two, "skipped") == [1]
    monkeypatch.setattr(DreamBooth, "losses", DreamBooth.losses)
    spoil()
    with pytest.warns(UserWarning, match="step 3 was skipped"):
        run(one)
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    "change", [(), ("lora=null", "optimizer.learning_rate=1e-3")], ids=["lora", "all weights"]
)
def test_bf16_computes_in_bf16_and_trains_in_float32(
    settings, launched, tmp_path, monkeypatch, change, stage
):
    more = ("checkpoint.checkpointing_steps=6", *change)
    one = settings(*more, f"output_dir={tmp_path}/one", family="flux")
    two = half(settings(*more, f"output_dir={tmp_path}/two", family="flux"))
    exact = settings(*more, f"output_dir={tmp_path}/exact", family="flux")
    run(exact)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(one)
    launched(two, stage, ACCELERATE_MIXED_PRECISION="bf16")
    torch.testing.assert_close(
        rows(one, "denoiser_loss"), rows(two, "denoiser_loss"), rtol=1e-2, atol=0
    )
    assert rows(exact, "denoiser_loss")[0] != rows(two, "denoiser_loss")[0]
    state = load_file(two.output_dir / "checkpoints/step-000006/denoiser.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert any((tensor != tensor.bfloat16()).any() for tensor in state.values())
