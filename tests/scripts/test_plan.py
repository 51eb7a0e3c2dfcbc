"""scripts/plan.py takes every config as it is shipped, with every preset and without photos."""

import pytest
import torch

from tests.shared.processes import ROOT, call
from trainers import memory_advice
from trainers.config.dreambooth import MEMORY_PRESETS
from trainers.config.loading import load_config
from trainers.errors import UserError

DREAMBOOTH_CONFIGS = sorted(
    path.name
    for path in (ROOT / "configs").glob("*.yaml")
    if "kind: dreambooth" in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", DREAMBOOTH_CONFIGS)
@pytest.mark.parametrize("preset", MEMORY_PRESETS)
def test_every_preset_goes_with_every_shipped_config(name, preset):
    path = ROOT / "configs" / name
    # the base of one of them is a folder that has to be built first
    base = "model.pretrained_model_name_or_path=owner/name"
    plain = load_config(path, [base], needs_pictures=False)
    config = load_config(path, [base, f"train.memory={preset}"], needs_pictures=False)
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


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ("no", [], "float32"),
        ("no", ["train.mixed_precision=bf16"], "bfloat16"),
        ("no", ["--memory", "24"], "bfloat16"),
        ("no", ["--memory", "24", "train.mixed_precision=fp16"], "float16"),
        ("fp16", ["train.mixed_precision=bf16"], "float16"),
        ("fp16", ["--precision", "no"], "float32"),
    ],
)
def test_a_plan_has_the_precision_that_the_run_will_have(
    bases, monkeypatch, capsys, environment, options, expected
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    planned = []
    monkeypatch.setattr(memory_advice.Planner, "plan", lambda self, _: planned.append(self.dtype))
    base = f"model.pretrained_model_name_or_path={bases['flux']}"
    # the first plan ends it
    with pytest.raises(AttributeError):
        call("plan.py", "configs/flux_dreambooth.yaml", base, "--tflops", "1", *options)
    assert f"torch.{expected}, 1.00 TFLOP/s" in capsys.readouterr().out
    assert planned == [getattr(torch, expected)]


def test_settings_are_recommended_for_cards(bases, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base = f"model.pretrained_model_name_or_path={bases['flux']}"
    options = [base, "data.resolution=64", "--tflops", "1"]
    assert call("plan.py", "configs/flux_dreambooth.yaml", *options) == 0
    rows = capsys.readouterr().out.splitlines()
    (row,) = [row for row in rows if row.startswith("| 8 GB |")]
    settings = row.split("|")[2].split("(")[0].split()
    load_config("configs/flux_dreambooth.yaml", [base, *settings], needs_pictures=False)
    assert settings == ["train.gradient_checkpointing=false", "train.train_batch_size=8"]
    assert "not calibrated" in rows[-1]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart_flux.yaml", "data.resolution=33"], "data.resolution: must be a multiple"),
        (["gan_mnist.yaml"], "is a run of gan: only DreamBooth runs have a plan"),
        (["unet_segment.yaml", "data.image_dir=."], "is a run of unet"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "configs")
    assert call("plan.py", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
