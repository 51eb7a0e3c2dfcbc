"""scripts/export.py --format single_file: one file in the release's layout, with the LoRA in it."""

import sys

import export as script
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from tests.shared.saved_loras import ALL
from tests.shared.tiny_pipelines import make_sdxl
from trainers.config import ModelConfig
from trainers.families import FAMILIES
from trainers.lora.single_file import scheduler_marks
from trainers.original.convert import diffusers_folder
from trainers.run_folder import WEIGHT_NAME


@pytest.mark.parametrize("name", ALL)
def test_the_file_is_the_merged_pipeline(made, bases, tmp_path, monkeypatch, capsys, name):
    folder, updates = made[name]
    for form, out in (("merged", "folder"), ("single_file", "file.safetensors")):
        arguments = [folder / WEIGHT_NAME, "--base", bases[name], "--format", form]
        words = map(str, ["export.py", *arguments, "--out", tmp_path / out])
        monkeypatch.setattr(sys, "argv", [*words])
        script.main()
        assert f"{len(updates)} layers merged" in capsys.readouterr().out
    where = {"pretrained_model_name_or_path": str(tmp_path / "file.safetensors")}
    model = ModelConfig(family=name, **where, config=str(bases[name]))
    ours, merged = map(
        DiffusionPipeline.from_pretrained, (diffusers_folder(model), tmp_path / "folder")
    )
    for part, module in merged.components.items():
        if isinstance(module, torch.nn.Module):
            state = getattr(ours, part).state_dict()
            assert all(torch.equal(state[key], x) for key, x in module.state_dict().items()), part
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert not file.metadata()["modelspec.architecture"].endswith("/lora")


def test_the_file_says_what_its_base_predicts(tmp_path):
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    make_sdxl(**settings).save_pretrained(tmp_path / "v")
    model = ModelConfig(family="sdxl", pretrained_model_name_or_path=str(tmp_path / "v"))
    family = FAMILIES["sdxl"](model)
    family.load()
    assert scheduler_marks(family).keys() == {"v_pred", "ztsnr"}
