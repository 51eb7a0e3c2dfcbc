"""A run whose optimizer averages the weights writes the average, and resumes to the bit."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.shared.runs import assert_same, lora, run_steps
from trainers import dreambooth
from trainers.run import run
from trainers.training.averages import ScheduleFreeAverage

pytest.importorskip("schedulefree")
CHOSEN = ("optimizer.name=schedule_free", "optimizer.learning_rate=1e-2")


def test_three_steps_and_three_more_equal_six_and_the_average_is_what_is_written(
    settings, tmp_path, monkeypatch
):
    shown = ("validation.prompts=[a b c]", "validation.validation_steps=2")
    straight, parts = (
        settings(*CHOSEN, *shown, f"output_dir={tmp_path}/{name}") for name in ("straight", "parts")
    )
    run(straight)
    run_steps(parts, 3)
    run(parts)
    assert_same(straight, parts)
    checkpoint = straight.output_dir / "checkpoints/step-000006"
    where = load_file(checkpoint / "denoiser.safetensors")
    average = load_file(checkpoint / "denoiser.ema.safetensors")
    assert where.keys() == average.keys()
    assert not all(torch.equal(where[name], average[name]) for name in where)
    written = {tensor.float().sum().item() for tensor in lora(straight).values()}
    assert written == {tensor.sum().item() for tensor in average.values()}


def test_another_optimizer_has_no_average_of_its_own(settings):
    players = [
        dreambooth.build(settings(*chosen), Accelerator(cpu=True))[0].players["denoiser"]
        for chosen in ((), CHOSEN)
    ]
    assert players[0].ema is None
    assert isinstance(players[1].ema, ScheduleFreeAverage)
