"""DoRA is read, merged and written as PEFT and diffusers do, or refused with the reason."""

import sys

import export as script
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tests.shared.runs import config_maker
from tests.shared.saved_loras import family_of
from trainers import dreambooth
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.lora import kohya
from trainers.lora.base_layers import merge_lora
from trainers.lora.files import load_lora, read_lora
from trainers.lora.low_rank import reduce_rank
from trainers.lora.update import (
    LoraUpdate,
    max_relative_difference,
)
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


@pytest.fixture(scope="module", params=["sd15", "flux"])
def dora(request, bases, photos, tmp_path_factory):
    """A family's name, and the folder of a saved task with DoRA whose magnitudes have changed."""
    name = request.param
    folder = tmp_path_factory.mktemp(f"dora_{name}")
    config = config_maker(bases, photos, folder)(
        "lora.use_dora=true", "lora.alpha=5", "lora.target_modules=all-linear", family=name
    )
    task, _, _ = dreambooth.build(config, Accelerator(cpu=True))
    torch.manual_seed(0)
    for layer in task.family.denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            nn.init.normal_(layer.lora_B["default"].weight)
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.data.mul_(1 + torch.rand_like(magnitude))
    config.output_dir.mkdir(exist_ok=True)
    task.save(config.output_dir)
    return name, config.output_dir


def merged_by_diffusers(bases, name, folder):
    """The denoiser's weights with the DoRA, as diffusers and PEFT merge it."""
    pipe = DiffusionPipeline.from_pretrained(bases[name])
    pipe.load_lora_weights(folder, weight_name=WEIGHT_NAME)
    return merged_weights(getattr(pipe, FAMILIES[name].denoiser_name))


def merged_weights(module):
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            found[name] = layer.base_layer.weight.detach()
    return found


def check_weights(found, expected):
    assert expected
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)


def test_dora_is_merged_as_peft_merges_it(bases, dora):
    name, folder = dora
    family = family_of(bases[name], name)
    family.load(family.denoiser_name, *family.clip_encoders)
    merge_lora(family, read_lora(folder / WEIGHT_NAME, family))
    found = {}
    for key, weight in family.denoiser.state_dict().items():
        found[key.removesuffix(".weight")] = weight
    check_weights(found, merged_by_diffusers(bases, name, folder))


def test_a_dora_run_is_written_for_peft_and_for_diffusers_again(bases, dora, tmp_path, monkeypatch):
    name, folder = dora
    family = family_of(bases[name], name)
    lora = read_lora(folder / WEIGHT_NAME, family)
    for form, out in (("peft", tmp_path / "peft"), ("diffusers", tmp_path / WEIGHT_NAME)):
        arguments = ["export.py", str(folder), "--format", form, "--out", str(out)]
        (folder / "config.yaml").write_text((folder.parent / "config.yaml").read_text())
        monkeypatch.setattr(sys, "argv", arguments)
        script.main()
        assert max_relative_difference(lora, read_lora(out, family)) == 0
    expected = merged_by_diffusers(bases, name, folder)
    check_weights(merged_by_diffusers(bases, name, tmp_path), expected)
    module = getattr(DiffusionPipeline.from_pretrained(bases[name]), family.denoiser_name)
    peft = PeftModel.from_pretrained(module, tmp_path / "peft" / family.denoiser_name)
    check_weights(merged_weights(peft.base_model.model), expected)


def test_a_dora_on_a_pipeline_is_what_diffusers_loads(bases, dora):
    name, folder = dora
    family = family_of(bases[name], name)
    family.load(family.denoiser_name, *family.clip_encoders)
    load_lora(family, folder / WEIGHT_NAME)
    check_weights(merged_weights(family.denoiser), merged_by_diffusers(bases, name, folder))


def test_what_cannot_hold_dora_says_why(bases, dora, tmp_path):
    name, folder = dora
    family = family_of(bases[name], name)
    lora = read_lora(folder / WEIGHT_NAME, family)
    with pytest.raises(UserError, match=r"dora_scale by.* --format merged, diffusers or peft"):
        kohya.write(lora, family, tmp_path / KOHYA_NAME, {})
    with pytest.raises(UserError, match=r"--format merged, then"):
        reduce_rank(lora, 1)
    assert not (tmp_path / KOHYA_NAME).exists()


def test_a_magnitude_counts_in_the_distance(bases, dora):
    name, folder = dora
    lora = read_lora(folder / WEIGHT_NAME, family_of(bases[name], name))
    changed = {k: LoraUpdate(x.a, x.b, x.magnitude * 1.5) for k, x in lora.items()}
    plain = {k: LoraUpdate(x.a, x.b) for k, x in lora.items()}
    assert max_relative_difference(lora, changed) == pytest.approx(0.5)
    assert max_relative_difference(lora, plain) == float("inf")
    assert max_relative_difference(plain, lora) == float("inf")
