"""Every reader finds the trained updates in the files: ours, diffusers, PEFT, and the rules of
ComfyUI and sd-scripts."""

import pytest
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from tests.shared.saved_loras import ALL, check, family_of, products
from trainers.lora import peft_format
from trainers.lora.base_layers import text_prefix
from trainers.lora.files import read_lora
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("file", [WEIGHT_NAME, KOHYA_NAME])
def test_our_own_reader_finds_every_update_in_both_files(made, bases, name, file):
    folder, updates = made[name]
    check(products(read_lora(folder / file, family_of(bases[name], name))), updates)


@pytest.mark.parametrize(
    ("name", "file"),
    [*((name, WEIGHT_NAME) for name in ALL), ("sd15", KOHYA_NAME), ("sdxl", KOHYA_NAME)],
)
def test_diffusers_finds_every_update(made, bases, name, file):
    folder, updates = made[name]
    pipe = DiffusionPipeline.from_pretrained(bases[name])
    pipe.load_lora_weights(folder, weight_name=file)
    found = {}
    for part in dict.fromkeys(key.partition(".")[0] for key in updates):
        module = getattr(pipe, part)
        (adapter,) = module.peft_config
        for layer_name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                delta = layer.get_delta_weight(adapter).detach().flatten(1)
                found[f"{part}.{text_prefix(module)}{layer_name}"] = delta
    check(found, updates)


def stems_of_sd15(pipe):
    """As sd-scripts walks the models: LoRA on linear and convolution layers, dots become
    underscores.

    Its CLIP has the level `text_model`; ComfyUI knows the same names.
    """
    stems = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for name, layer in getattr(pipe, part).named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                name = name.removeprefix("text_model.")
                level = "text_model." if part == "text_encoder" else ""
                stems[prefix + name.replace(".", "_")] = f"{part}.{level}{name}"
    return stems


def strengths(file):
    """Stem -> alpha / rank x up x down: what A1111, ComfyUI and sd-scripts add to a weight."""
    state, found = load_file(file), {}
    for key, down in state.items():
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            up, alpha = state[f"{stem}.lora_up.weight"], state[f"{stem}.alpha"].item()
            found[stem] = alpha / len(down) * up.flatten(1) @ down.flatten(1)
    assert len(found) * 3 == len(state)
    return found


def test_sd_scripts_rules_find_every_update_of_sd15(made, bases):
    folder, updates = made["sd15"]
    stems = stems_of_sd15(DiffusionPipeline.from_pretrained(bases["sd15"]))
    check(
        {stems[stem]: product for stem, product in strengths(folder / KOHYA_NAME).items()}, updates
    )


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_comfyuis_rules_find_every_update_in_diffusers_file(made, bases, name):
    """For these it takes `transformer.` and diffusers' module names, CLIP by
    `text_encoder.text_model.`, and, without an alpha beside them, a strength of one."""
    folder, updates = made[name]
    state, pipe = load_file(folder / WEIGHT_NAME), DiffusionPipeline.from_pretrained(bases[name])
    known = {f"transformer.{name}" for name, _ in pipe.transformer.named_parameters()}
    found = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            assert f"{stem}.weight" in known or ".text_model.encoder.layers." in stem
            found[stem] = state[f"{stem}.lora_B.weight"].flatten(1) @ a.flatten(1)
    check(found, updates)


@pytest.mark.parametrize("name", ALL)
def test_peft_finds_every_update(made, bases, tmp_path, name):
    folder, updates = made[name]
    family = family_of(bases[name], name)
    peft_format.write(read_lora(folder / WEIGHT_NAME, family), family, tmp_path, {})
    pipe, found = DiffusionPipeline.from_pretrained(bases[name]), {}
    for part in dict.fromkeys(key.partition(".")[0] for key in updates):
        module = getattr(pipe, part)
        prefix = f"{part}.{text_prefix(module)}"
        peft = PeftModel.from_pretrained(module, tmp_path / part)
        for layer_name, layer in peft.base_model.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                found[prefix + layer_name] = layer.get_delta_weight("default").detach().flatten(1)
    check(found, updates)
    check(products(read_lora(tmp_path, family)), updates)
