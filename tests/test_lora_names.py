"""The LoRA files of every program are read exactly: the same updates as by diffusers' own reader
where it has one, and at the models' true sizes."""

import re
from importlib import import_module

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_fal_kontext_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from true_sizes import SD35_LARGE, true_size_base

from trainers.config import ModelConfig
from trainers.families import FAMILIES
from trainers.lora.base_layers import adaptable_shapes, text_prefix
from trainers.lora.export import base_architecture
from trainers.lora.files import read_lora
from trainers.lora.formats import FORMATS, READ_FORMATS, all_layer_names, load_format
from trainers.lora.names import released_rows
from trainers.lora.update import LoraUpdate, max_relative_difference

FAMILY_NAMES = ("sd15", "sd3", "flux")


@pytest.fixture(scope="module")
def true_bases(tmp_path_factory):
    """Family name -> the family of a base of true size, without a weight."""
    return {name: true_size_base(tmp_path_factory.mktemp(name), name) for name in FAMILY_NAMES}


def random_lora(family, rank=2, start="", seed=0):
    """A LoRA on every layer whose name begins with `start`."""
    rng, lora = torch.Generator().manual_seed(seed), {}
    for name, (outputs, *inputs) in adaptable_shapes(family).items():
        if name.startswith(start):
            a = torch.randn(rank, *inputs, generator=rng)
            kernel = [1] * (len(inputs) - 1)
            lora[name] = LoraUpdate(a, torch.randn(outputs, rank, *kernel, generator=rng))
    return lora


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


def read_state(state, family, folder):
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "x.safetensors")
    return read_lora(folder / "x.safetensors", family)


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


# SD1.5 and SD3.5 as diffusers itself loads them


def family_of(bases, name):
    return FAMILIES[name](ModelConfig(family=name, pretrained_model_name_or_path=str(bases[name])))


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
    family = family_of(bases, name)
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
    for name, update in random_lora(family_of(bases, "sd15")).items():
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
    family = family_of(bases, "sd15")
    load_format("kohya").write(random_lora(family), family, tmp_path / "k.safetensors", {})
    state = load_file(tmp_path / "k.safetensors")
    state = {key.replace("lora_te_", text): value for key, value in state.items()}
    assert len(check_like_diffusers(bases, "sd15", state, tmp_path)) == len(state) // 3


def test_comfyuis_text_encoders_of_sd3_are_read(bases, tmp_path):
    family, state = family_of(bases, "sd3"), {}
    lora = random_lora(family, start="text_encoder")
    for name, update in lora.items():
        component, _, layer = name.partition(".")
        clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
        stem = f"text_encoders.{clip}.transformer.{layer}"
        state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"] = update.a, update.b
    assert max_relative_difference(lora, read_state(state, family, tmp_path)) == 0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_diffusers_loads_what_we_write_in_its_format_with_several_ranks(bases, tmp_path, name):
    """Also where the name of a layer is the end of others' names."""
    family = family_of(bases, name)
    small, large = random_lora(family), random_lora(family, rank=3)
    mixed = {key: (large if i % 3 else small)[key] for i, key in enumerate(small)}
    mixed |= {key: large[key] for key in small if key.count(".") == 1}
    file = tmp_path / "out.safetensors"
    load_format("diffusers").write(mixed, family, file, {})
    found = loaded_by_diffusers(bases[name], family, file)
    assert found.keys() == mixed.keys()
    for layer, product in found.items():
        torch.testing.assert_close(product, mixed[layer].delta_weight())


# What the base is


def test_architectures_are_those_that_readers_know(true_bases, tmp_path):
    found = {name: base_architecture(family) for name, family in true_bases.items()}
    assert found == {
        "sd15": "stable-diffusion-v1",
        "sd3": "stable-diffusion-v3.5-medium",
        "flux": "flux-1-dev",
    }
    large = true_size_base(tmp_path / "large", "sd3", **SD35_LARGE)
    assert base_architecture(large) == "stable-diffusion-v3.5-large"
    old = true_size_base(tmp_path / "old", "sd3", qk_norm=None, dual_attention_layers=[])
    assert base_architecture(old) == "stable-diffusion-v3-medium"
    schnell = true_size_base(tmp_path / "schnell", "flux", guidance_embeds=False)
    assert base_architecture(schnell) == "flux-1-schnell"
