"""A run's precision is the launcher's, else the config's, else the device's, and is recorded."""

import json

import pytest
import torch
import yaml

from trainers.config import DreamBoothConfig, GanConfig
from trainers.distributed import accelerator as module
from trainers.distributed.accelerator import choose_mixed_precision
from trainers.run import run

LAUNCHER = "ACCELERATE_MIXED_PRECISION"


def config(precision):
    return DreamBoothConfig.model_validate({"train": {"mixed_precision": precision}})


@pytest.mark.parametrize("asked", ["auto", "no", "fp16", "bf16"])
@pytest.mark.parametrize("launcher", ["fp16", "bf16", "BF16"])
def test_the_launchers_choice_wins(asked, launcher):
    assert choose_mixed_precision(config(asked), {LAUNCHER: launcher}) == launcher.lower()


@pytest.mark.parametrize("environment", [{}, {LAUNCHER: "no"}])
@pytest.mark.parametrize("asked", ["no", "fp16", "bf16"])
def test_the_config_decides_where_the_launcher_chose_nothing(asked, environment):
    assert choose_mixed_precision(config(asked), environment) == asked


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "no"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_auto_is_what_the_device_computes_in(monkeypatch, dtype, name):
    monkeypatch.setattr(module, "preferred_dtype", lambda device: dtype)
    assert choose_mixed_precision(config("auto"), {}) == name


def test_lora_computes_as_the_device_prefers_and_small_networks_in_float32():
    assert DreamBoothConfig().train.mixed_precision == "auto"
    assert GanConfig().train.mixed_precision == "no"


def test_the_precision_is_recorded_and_another_one_is_refused_on_resume(settings):
    run(settings("train.mixed_precision=bf16", "train.max_train_steps=2"))
    folder = settings().output_dir
    assert (
        yaml.safe_load((folder / "config.yaml").read_text())["train"]["mixed_precision"] == "bf16"
    )
    assert "| Precision | bf16 |" in (folder / "README.md").read_text()
    manifest = json.loads((folder / "checkpoints/step-000002/manifest.json").read_text())
    assert manifest["facts"]["mixed precision"] == "bf16"
