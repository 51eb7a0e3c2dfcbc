"""In float16 the loss is scaled: an overflow is skipped and counted, and the scale is resumed."""

import pytest
import torch

from tests.shared.runs import lora, read_metrics, run_steps
from trainers.distributed import accelerator as module
from trainers.errors import RunFailedError
from trainers.run import run

FLOAT16 = "train.mixed_precision=fp16"


@pytest.fixture
def scaled(monkeypatch):
    """A function: the scale that runs begin with, and how it changes."""
    real = torch.amp.GradScaler

    def use(**options):
        monkeypatch.setattr(module.torch.amp, "GradScaler", lambda device: real(device, **options))

    return use


def column(settings, name):
    return [row.get(name) for row in read_metrics(settings)]


def test_a_step_whose_gradient_overflows_changes_nothing_and_is_counted(settings, scaled):
    """The scale goes from 2^40 to 2^10 in two steps, and what was skipped is no fault."""
    scaled(init_scale=2.0**40, backoff_factor=2.0**-15)
    config = settings(FLOAT16, "train.max_train_steps=4", "checkpoint.checkpointing_steps=1")
    run(config)
    assert column(config, "overflowed") == [1, 1, None, None]
    assert column(config, "skipped") == [None] * 4
    assert column(config, "loss_scale") == [2.0**25, 2.0**10, 2.0**10, 2.0**10]
    assert all(loss > 0 for loss in column(config, "denoiser_loss"))


def test_overflows_alone_leave_the_weights_as_they_were(settings, scaled):
    scaled(init_scale=2.0**40, backoff_factor=0.5)
    config = settings(FLOAT16, "train.max_train_steps=2")
    run(config)
    assert column(config, "overflowed") == [1, 1]
    ups = [value for name, value in lora(config).items() if "lora_B" in name or ".up." in name]
    assert ups
    assert not any(value.any() for value in ups)


def test_a_resumed_run_goes_on_with_its_scale_to_the_bit(settings, scaled, tmp_path):
    """The scale doubles after two steps, counted across the stop."""
    scaled(init_scale=2.0**7, growth_interval=2)
    whole = settings(FLOAT16, f"output_dir={tmp_path}/whole")
    parts = settings(FLOAT16, f"output_dir={tmp_path}/parts")
    run(whole)
    run_steps(parts, 3)
    run(parts)
    assert column(whole, "loss_scale") == [2.0**n for n in (7, 8, 8, 9, 9, 10)]
    assert column(parts, "loss_scale") == column(whole, "loss_scale")
    assert all(torch.equal(value, lora(parts)[name]) for name, value in lora(whole).items())


def test_a_gradient_that_stays_infinite_without_a_scale_ends_the_run(settings, scaled, monkeypatch):
    """Else every step would be an overflow, and nothing would ever be learnt."""
    scaled(init_scale=1.0)
    norm = torch.tensor(torch.inf)
    monkeypatch.setattr("trainers.training.loop.clip_and_step", lambda *_: (norm, torch.zeros(())))
    monkeypatch.setattr(
        "torch.amp.grad_scaler.GradScaler.get_scale", lambda self: 0.5, raising=True
    )
    with pytest.raises(RunFailedError, match="5 steps in a row had no finite gradient"):
        run(settings(FLOAT16, "train.on_divergence=stop"))
