"""LoRA files on tiny pipelines: what diffusers loads of them, layer by layer, is what we read."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from tests.shared.lora_files import random_lora, read_state
from tests.shared.saved_loras import family_of
from trainers.lora.base_layers import text_prefix
from trainers.lora.formats import load_format
from trainers.lora.update import max_relative_difference


def loaded_by_diffusers(folder_of_base, family, file):
    """The products B A of each layer, as a user of diffusers gets them."""
    pipe, found = DiffusionPipeline.from_pretrained(folder_of_base), {}
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    for part in (family.denoiser_name, *family.clip_encoders):
        module = getattr(pipe, part)
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                (adapter,) = layer.active_adapters
                delta = layer.get_delta_weight(adapter).detach().flatten(1)
                found[f"{part}.{text_prefix(module)}{name}"] = delta
    return found


def check_like_diffusers(bases, name, state, folder):
    family = family_of(bases[name], name)
    ours = read_state(state, family, folder)
    theirs = loaded_by_diffusers(bases[name], family, folder / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for layer, product in theirs.items():
        torch.testing.assert_close(ours[layer].delta_weight(), product)
    return ours


SPELLINGS = {
    "lora.down": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "lora_linear_layer": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "processor": ("{}_lora.down.weight", "{}_lora.up.weight"),
}


@pytest.mark.parametrize("unet", ["lora.down", "processor"])
@pytest.mark.parametrize("text", ["lora_linear_layer", "processor"])
def test_old_sd15_files_of_diffusers_are_what_it_makes_of_them(bases, tmp_path, unet, text):
    state = {}
    for name, update in random_lora(family_of(bases["sd15"], "sd15")).items():
        is_text = name.startswith("text_encoder.")
        if not re.search(r"\.to_(q|k|v|out\.0)$" if not is_text else r"self_attn", name):
            continue
        stem, style = name, text if is_text else unet
        if style == "processor" and is_text:
            stem = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", name)
        elif style == "processor":
            stem = name.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
        down, up = SPELLINGS[style]
        state[down.format(stem)], state[up.format(stem)] = update.a, update.b
    ours = check_like_diffusers(bases, "sd15", state, tmp_path)
    assert len(ours) == len(state) // 2 > 20


@pytest.mark.parametrize("text", ["lora_te_", "lora_te1_"])
def test_both_spellings_of_kohyas_text_encoder_are_read(bases, tmp_path, text):
    family = family_of(bases["sd15"], "sd15")
    load_format("kohya").write(random_lora(family), family, tmp_path / "k.safetensors", {})
    state = load_file(tmp_path / "k.safetensors")
    state = {key.replace("lora_te_", text): value for key, value in state.items()}
    assert len(check_like_diffusers(bases, "sd15", state, tmp_path)) == len(state) // 3


def test_comfyuis_text_encoders_of_sd3_are_read(bases, tmp_path):
    family, state = family_of(bases["sd3"], "sd3"), {}
    lora = random_lora(family, start="text_encoder")
    for name, update in lora.items():
        component, _, layer = name.partition(".")
        clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
        stem = f"text_encoders.{clip}.transformer.{layer}"
        state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"] = update.a, update.b
    assert max_relative_difference(lora, read_state(state, family, tmp_path)) == 0


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_diffusers_loads_what_we_write_in_its_format_with_several_ranks(bases, tmp_path, name):
    """Also where the name of a layer is the end of others' names."""
    family = family_of(bases[name], name)
    small, large = random_lora(family), random_lora(family, rank=3)
    mixed = dict(large)
    for i, key in enumerate(small):
        # of layers like transformer.proj_out, which is the end of others' names
        if key.count(".") == 1 or (i % 5 == 0 and "proj_out" not in key):
            mixed[key] = small[key]
    file = tmp_path / "out.safetensors"
    load_format("diffusers").write(mixed, family, file, {})
    found = loaded_by_diffusers(bases[name], family, file)
    assert found.keys() == mixed.keys()
    for layer, product in found.items():
        torch.testing.assert_close(product, mixed[layer].delta_weight())
