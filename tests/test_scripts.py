"""What users type: help, presets and plans, unfinished runs, and what the scripts print."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, call

from trainers.config.dreambooth import MEMORY_PRESETS
from trainers.config.loading import load_config
from trainers.distributed.accelerator import preferred_dtype
from trainers.errors import UserError
from trainers.run import run

SCRIPTS = sorted(
    str(path.relative_to(ROOT / "scripts"))
    for pattern in ("*.py", "results/*.py", "small_world/build.py", "benchmark/inside.py")
    for path in (ROOT / "scripts").glob(pattern)
    if path.name not in ("common.py", "plain_loops.py")
)
DREAMBOOTH_CONFIGS = sorted(
    path.name
    for path in (ROOT / "configs").glob("*.yaml")
    if "kind: dreambooth" in path.read_text("utf-8")
)


@pytest.mark.parametrize("script", [*SCRIPTS, "benchmark"])
def test_help_is_printed_and_nothing_is_run(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts" / Path(script).parent)
    assert call(script, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--steps=3"], ["train.max_train_steps=0"]])
def test_the_quickstart_reads_options_without_a_config(options, capsys):
    assert call("quickstart.py", *options) == 2
    assert options[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", DREAMBOOTH_CONFIGS)
@pytest.mark.parametrize("preset", MEMORY_PRESETS)
def test_every_preset_goes_with_every_shipped_config(name, preset):
    path = ROOT / "configs" / name
    overrides = [f"train.memory={preset}"]
    plain = load_config(path, needs_pictures=False)
    config = load_config(path, overrides, needs_pictures=False)
    for section, key in [("model", "quantization"), ("train", "gradient_checkpointing")]:
        default = type(getattr(plain, section)).model_fields[key].default
        own = getattr(getattr(plain, section), key)
        assert own in (default, getattr(getattr(config, section), key))


@pytest.mark.parametrize(
    "option",
    [
        "model.quantization=nf4",
        "model.quantization=int8",
        "model.modulation_cache=true",
        "train.compile=true",
        "train.train_text_encoder=true",
        "lora=null",
    ],
)
@pytest.mark.parametrize("preset", MEMORY_PRESETS)
def test_a_preset_leaves_out_what_an_option_excludes(settings, option, preset):
    settings(option, f"train.memory={preset}", family="flux")


def test_pictures_are_needed_to_train_only(settings):
    missing = "data.instance_data_dir=nowhere"
    with pytest.raises(UserError, match="no such folder"):
        settings(missing)
    path = settings().output_dir.parent / "config.yaml"
    assert load_config(path, [missing], needs_pictures=False).data.instance_data_dir
    with pytest.raises(UserError, match="resolution"):
        load_config(path, ["data.resolution=0"], needs_pictures=False)


def test_a_shipped_config_is_planned_without_photos(bases, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base = f"model.pretrained_model_name_or_path={bases['flux']}"
    options = [base, "data.resolution=64", "--memory", "24", "--tflops", "1"]
    assert call("plan.py", "configs/flux_dreambooth.yaml", *options) == 0
    printed = capsys.readouterr().out
    assert "balanced, low, lowest: no different here" in printed
    assert printed.splitlines()[-1] == "train.memory=fast"


def test_a_plan_names_the_presets_that_the_config_excludes(bases, monkeypatch, capsys):
    """Two of them do not compute each block again, as offloading needs it."""
    monkeypatch.chdir(ROOT)
    base = f"model.pretrained_model_name_or_path={bases['flux']}"
    options = [base, "model.offload=true", "--memory", "24", "--tflops", "1"]
    assert call("plan.py", "configs/quickstart_flux.yaml", *options) == 0
    printed = capsys.readouterr().out
    for preset in ("fast", "balanced"):
        assert f"train.memory={preset} is left out. model.offload: requires" in printed
    assert printed.splitlines()[-1] == "train.memory=low"


def test_a_plan_of_what_no_preset_can_train_tells_why(bases, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert call("plan.py", "configs/quickstart_flux.yaml", "data.resolution=33") == 2
    assert "data.resolution" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["generate.py", "export.py", "evaluate.py", "push.py"])
def test_a_run_that_was_stopped_is_called_unfinished(settings, script, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = settings()
    folder = config.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text((folder.parent / "config.yaml").read_text())
    options = ["--prompt", "a b c"] if script == "generate.py" else []
    assert call(script, folder, *options) == 2
    message = capsys.readouterr().err
    assert f"{folder} is not finished" in message
    assert "starts from step 0" in message
    (folder / "checkpoints/step-000004").mkdir(parents=True)
    assert call(script, folder, *options) == 2
    assert "goes on from its checkpoint step-000004" in capsys.readouterr().err


def test_only_accelerators_without_bfloat16_compute_in_float16(monkeypatch):
    assert preferred_dtype(torch.device("cpu")) == torch.float32
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        # a Turing card can only emulate it
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, found=has_bfloat16: found or including_emulation,
        )
        assert preferred_dtype(torch.device("cuda")) == expected


def test_a_warning_is_one_plain_line_until_the_script_ends():
    script = """
import warnings
from trainers import cli
before = warnings.formatwarning
cli.run_main(lambda: warnings.warn("the disk\\n  is slow", stacklevel=1))
print(warnings.formatwarning is before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("warning: the disk is slow\n", "True\n")


def test_a_lora_file_is_exported_without_notices_of_libraries(settings, bases, tmp_path):
    config = settings("train.max_train_steps=1")
    run(config)
    file = config.output_dir / "pytorch_lora_weights.safetensors"
    options = ["--base", bases["sd15"], "--out", tmp_path / "out.safetensors"]
    command = [sys.executable, "scripts/export.py", file, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
