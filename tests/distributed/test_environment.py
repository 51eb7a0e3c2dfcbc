"""What accelerate reads from the environment and the config says too is refused where they differ;
the run folder is a folder of its own."""

import pytest

from trainers.distributed.accelerator import check_environment, make_accelerator
from trainers.errors import UserError
from trainers.run import TASKS, run


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", "train.gradient_accumulation_steps=1"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "train.gradient_accumulation_steps=1"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "", "train.gradient_accumulation_steps=1"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "train.max_grad_norm=1"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "model.quantization"),
        ("ACCELERATE_MIXED_PRECISION", "fp15", "fp16"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "FSDP2"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "FSDP2"),
    ],
)
def test_a_variable_that_would_win_over_the_config_is_refused(
    settings, monkeypatch, name, value, key
):
    config = settings()
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(TASKS, "dreambooth", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(UserError) as caught:
        run(config)
    assert name in str(caught.value)
    assert key in str(caught.value)
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_MIXED_PRECISION", "BF16"),
        ("ACCELERATE_USE_MEGATRON_LM", "false"),
    ],
)
def test_a_variable_that_agrees_is_let_through(settings, name, value):
    check_environment(settings("train.gradient_accumulation_steps=2"), {name: value})


def test_the_config_decides_how_many_micro_batches_make_a_step(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    accelerator, _ = make_accelerator(settings("train.gradient_accumulation_steps=2"))
    assert accelerator.gradient_accumulation_steps == 2


@pytest.mark.parametrize("folder", [".", "..", "/", "~", "./", "runs/..", "", "$HOME"])
def test_a_run_folder_that_holds_other_things_is_refused(settings, monkeypatch, tmp_path, folder):
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = folder.replace("$HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"^output_dir: must"):
        settings(f"output_dir='{folder}'")


def test_a_run_folder_beside_or_below_is_taken(settings, monkeypatch, tmp_path):
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "work")
    for folder in ("runs/rex", "../other", "~/runs/rex"):
        settings(f"output_dir={folder}")
