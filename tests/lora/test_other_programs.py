"""The LoRA files of every program are read exactly: the same updates as by diffusers' own reader
where it has one, and at the models' true sizes."""

import re
from importlib import import_module

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_fal_kontext_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file

from tests.shared.lora_files import random_lora, read_state
from tests.shared.true_sizes import SD35_LARGE, true_size_base
from trainers.lora import released_unet
from trainers.lora.base_layers import adaptable_layers, adaptable_shapes
from trainers.lora.export import base_architecture
from trainers.lora.files import read_lora
from trainers.lora.formats import FORMATS, READ_FORMATS, all_layer_names, load_format
from trainers.lora.names import released_rows
from trainers.lora.update import LoraUpdate, max_relative_difference

FAMILY_NAMES = ("sd15", "sdxl", "sd3", "flux")


def from_diffusers(state):
    """The updates that diffusers makes of a file, from its converted tensors."""
    lora = {}
    for key, a in state.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            prefix = "" if stem.startswith(("transformer.", "text_encoder.")) else "transformer."
            lora[prefix + stem] = LoraUpdate(a.float(), state[f"{stem}.lora_B.weight"].float())
    return lora


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_written_format_is_read_back_exactly_at_true_size(true_bases, tmp_path, name, form):
    family = true_bases[name]
    lora = random_lora(family, rank=1)
    out = tmp_path / f"out{load_format(form).SUFFIX}"
    load_format(form).write(lora, family, out, {})
    back = read_lora(out, family)
    assert back.keys() == lora.keys() == adaptable_shapes(family).keys()
    assert max_relative_difference(lora, back) == 0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_no_name_is_of_two_layers(true_bases, name):
    """A file may mix formats: what one of them calls a layer is nothing else in another."""
    family = true_bases[name]
    names = all_layer_names(family)
    for module in (*FORMATS.values(), *READ_FORMATS.values()):
        assert import_module(module).layer_names(family).items() <= names.items()
    known = {layer for rows in names.values() for layer in rows.layers}
    assert known == adaptable_shapes(family).keys()


# Flux.1 from other programs, with diffusers' converters as oracles


def released_state(lora, family, folder, prefix):
    """kohya's tensors by the dotted names of the released model, after a prefix."""
    load_format("kohya").write(lora, family, folder / "kohya.safetensors", {})
    names = {}
    for released in released_rows(adaptable_shapes(family), family.facts.kohya):
        names["lora_unet_" + released.replace(".", "_")] = prefix + released
    state = {}
    for key, value in load_file(folder / "kohya.safetensors").items():
        stem, _, kind = key.partition(".")
        state[f"{names[stem]}.{kind}"] = value
    return state


def test_comfyuis_flux_files_are_what_diffusers_makes_of_them(true_bases, tmp_path):
    """Its converter takes no final_layer.adaLN_modulation under these names."""
    family = true_bases["flux"]
    lora = random_lora(family, start="transformer.")
    state = released_state(lora, family, tmp_path, "diffusion_model.")
    state |= {key: 3 * value for key, value in state.items() if key.endswith(".alpha")}
    ours = read_state(state, family, tmp_path)
    assert ours.keys() == lora.keys()
    final = ("final_layer", "time_in", "vector_in", "guidance_in", "img_in", "txt_in")
    spared = {key: value for key, value in state.items() if not any(n in key for n in final)}
    theirs = from_diffusers(_convert_kohya_flux_lora_to_diffusers(dict(spared)))
    assert len(theirs) > 450
    assert max_relative_difference(theirs, {name: ours[name] for name in theirs}) < 1e-5
    assert max_relative_difference(lora, ours) == pytest.approx(2, rel=1e-5)


def test_flux_files_of_peft_on_the_released_model_are_what_diffusers_makes_of_them(
    true_bases, tmp_path
):
    family = true_bases["flux"]
    lora = random_lora(family, start="transformer.")
    state = {}
    for key, value in released_state(lora, family, tmp_path, "base_model.model.").items():
        key = key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        if not key.endswith(".alpha"):
            state[key] = value
    ours = read_state(state, family, tmp_path)
    assert max_relative_difference(lora, ours) == 0
    unknown = ("adaLN", "time_in", "vector_in", "guidance_in", "img_in", "txt_in")
    spared = {key: value for key, value in state.items() if not any(n in key for n in unknown)}
    theirs = from_diffusers(_convert_fal_kontext_lora_to_diffusers(dict(spared)))
    assert max_relative_difference(theirs, {name: ours[name] for name in theirs}) < 1e-5


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_files_are_what_diffusers_makes_of_them(true_bases, tmp_path, prefix):
    family, rng, state = true_bases["flux"], torch.Generator().manual_seed(0), {}
    sizes = {"qkv_lora1": 9216, "qkv_lora2": 9216, "proj_lora1": 3072, "proj_lora2": 3072}
    for name, outputs in sizes.items():
        stem = f"{prefix}double_blocks.7.processor.{name}"
        state[f"{stem}.down.weight"] = torch.randn(4, 3072, generator=rng)
        state[f"{stem}.up.weight"] = torch.randn(outputs, 4, generator=rng)
    for name, outputs, inputs in (("qkv_lora", 9216, 3072), ("proj_lora", 3072, 15360)):
        stem = f"{prefix}single_blocks.30.processor.{name}"
        state[f"{stem}.down.weight"] = torch.randn(4, inputs, generator=rng)
        state[f"{stem}.up.weight"] = torch.randn(outputs, 4, generator=rng)
    ours = read_state(state, family, tmp_path)
    theirs = from_diffusers(_convert_xlabs_flux_lora_to_diffusers(dict(state)))
    assert len(ours) == 2 * 4 + 3 + 1
    assert ours.keys() == theirs.keys()
    assert max_relative_difference(theirs, ours) == 0


def test_onetrainers_flux_files_are_what_diffusers_makes_of_them(true_bases, tmp_path):
    """Attention alone: its converter forgets the ends of the other names."""
    family = true_bases["flux"]
    state = {}
    for name, update in random_lora(family).items():
        component, _, layer = name.partition(".")
        if component == "transformer" and ".attn." in layer:
            stem = "lora_transformer_" + layer.replace(".", "_")
        elif component == "text_encoder" and "self_attn" in layer:
            stem = "lora_te1_" + layer.replace(".", "_")
        else:
            continue
        state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = update.a, update.b
        state[f"{stem}.alpha"] = torch.tensor(1.0)
    ours = read_state(state, family, tmp_path)
    theirs = from_diffusers(_convert_kohya_flux_lora_to_diffusers(dict(state)))
    assert len(ours) == len(state) // 3
    assert max_relative_difference(theirs, ours) < 1e-5


# The U-Nets from other programs

# of sd-scripts' own U-Net, which is Stability's
SD_SCRIPTS_SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": "unet.down_blocks.1.attentions.0."
    "transformer_blocks.1.attn2.to_k",
    "lora_unet_input_blocks_8_1_proj_in": "unet.down_blocks.2.attentions.1.proj_in",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": "unet.mid_block.attentions.0."
    "transformer_blocks.9.ff.net.0.proj",
    "lora_unet_output_blocks_5_1_transformer_blocks_0_attn1_to_out_0": "unet.up_blocks.1."
    "attentions.2.transformer_blocks.0.attn1.to_out.0",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_input_blocks_7_0_in_layers_2": "unet.down_blocks.2.resnets.0.conv1",
    "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
    "lora_te1_text_model_encoder_layers_10_mlp_fc1": "text_encoder.text_model.encoder.layers.10."
    "mlp.fc1",
    "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": "text_encoder_2.text_model.encoder."
    "layers.31.self_attn.q_proj",
}


def test_kohyas_names_of_sdxl_are_those_of_sd_scripts(true_bases):
    family = true_bases["sdxl"]
    names = load_format("kohya").written_names(family, adaptable_layers(family))
    assert {name: names[name].layers[0] for name in SD_SCRIPTS_SDXL} == SD_SCRIPTS_SDXL
    # what sd-scripts trains by default: attention, forward and projection layers
    blocks = [name for name in names if re.search(r"_blocks?(_\d+)?_1_(transformer|proj)", name)]
    assert len(blocks) == 722


def test_files_of_sdxl_with_diffusers_names_in_kohyas_way_are_read(true_bases, tmp_path):
    """OneTrainer and diffusers' own converter write them."""
    family = true_bases["sdxl"]
    lora, state = random_lora(family, rank=1, start="unet.mid_block"), {}
    for name, update in lora.items():
        stem = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = update.a, update.b
    assert max_relative_difference(lora, read_state(state, family, tmp_path)) == 0


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_released_names_of_a_unet_are_those_of_diffusers_converter(true_bases, name):
    """It converts a released checkpoint; each weight here is the released name of its layer."""
    family = true_bases[name]
    names = {}
    for name, rows in released_unet.layer_names(family).items():
        if name.startswith("diffusion_model."):
            names[name] = rows.layers[0]
    checkpoint = {f"model.{name}.weight": name for name in names}
    checkpoint |= {f"model.{name}.bias": "" for name in names}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(family.denoiser_config))
    found = {}
    for key, name in converted.items():
        # of biases, and of what is not there, it has entries too
        if name:
            found[name] = f"unet.{key.removesuffix('.weight')}"
    assert found == names
    assert set(names.values()) == {n for n in adaptable_shapes(family) if n.startswith("unet.")}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_comfyuis_names_of_a_unet_are_of_every_layer(true_bases, tmp_path, name):
    family = true_bases[name]
    lora, state = random_lora(family, start="unet."), {}
    for name, rows in released_unet.layer_names(family).items():
        if name.startswith("diffusion_model."):
            update = lora[rows.layers[0]]
            state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = update.a, update.b
    assert max_relative_difference(lora, read_state(state, family, tmp_path)) == 0


# What the base is


def test_architectures_are_those_that_readers_know(true_bases, tmp_path):
    found = {name: base_architecture(family) for name, family in true_bases.items()}
    assert found == {
        "sd15": "stable-diffusion-v1",
        "sdxl": "stable-diffusion-xl-v1-base",
        "sd3": "stable-diffusion-v3.5-medium",
        "flux": "flux-1-dev",
    }
    large = true_size_base(tmp_path / "large", "sd3", **SD35_LARGE)
    assert base_architecture(large) == "stable-diffusion-v3.5-large"
    old = true_size_base(tmp_path / "old", "sd3", qk_norm=None, dual_attention_layers=[])
    assert base_architecture(old) == "stable-diffusion-v3-medium"
    schnell = true_size_base(tmp_path / "schnell", "flux", guidance_embeds=False)
    assert base_architecture(schnell) == "flux-1-schnell"
