"""LoRA files for models that a language model reads prompts for: every program's names of their
layers, and diffusers' own converters as oracles."""

import re

import pytest
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file

from tests.shared.language_models import READ_BY_LANGUAGE_MODELS
from tests.shared.lora_files import random_lora, read_state
from tests.shared.saved_loras import check, family_of, products
from trainers.errors import UserError
from trainers.lora.base_layers import adaptable_layers, adaptable_shapes
from trainers.lora.files import read_lora
from trainers.lora.formats import FORMATS, all_layer_names, load_format
from trainers.lora.layers import target_layers
from trainers.lora.names import base_architecture, released_rows
from trainers.lora.update import max_relative_difference
from trainers.tensor_file import read_header

CHECKPOINTS = {
    "flux2_klein": convert_flux2_transformer_checkpoint_to_diffusers,
    "z_image": convert_z_image_transformer_checkpoint_to_diffusers,
}
KOHYA = {
    "flux2_klein": _convert_kohya_flux2_lora_to_diffusers,
    "z_image": _convert_non_diffusers_z_image_lora_to_diffusers,
}
# the other one takes diffusers' names alone after ComfyUI's prefix
COMFYUI = {"flux2_klein": _convert_non_diffusers_flux2_lora_to_diffusers}
# what these converters leave out, or do not turn as the one of checkpoints does
UNREAD_FROM_KOHYA = {
    "flux2_klein": ("stream_modulation", "norm_out"),
    "z_image": ("all_x_embedder", "all_final_layer"),
}
NOT_TURNED = {"flux2_klein": ("norm_out",), "z_image": ()}


@pytest.fixture(scope="module", params=READ_BY_LANGUAGE_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(bases, name):
    return family_of(bases[name], name)


@pytest.mark.parametrize("form", FORMATS)
def test_every_written_format_is_read_back_exactly(family, tmp_path, form):
    lora = random_lora(family)
    assert lora.keys() == adaptable_shapes(family).keys()
    out = tmp_path / f"out{load_format(form).SUFFIX}"
    load_format(form).write(lora, family, out, {})
    back = read_lora(out, family)
    assert back.keys() == lora.keys()
    assert max_relative_difference(lora, back) == 0


def released_state(lora, family, folder, separator):
    """kohya's tensors, and the weights that they add to layers of the released model."""
    load_format("kohya").write(lora, family, folder / "kohya.safetensors", {})
    names = {
        "lora_unet_" + released.replace(".", "_"): released
        for released in released_rows(adaptable_shapes(family), family.facts.kohya)
    }
    state = load_file(folder / "kohya.safetensors")
    return state, {stem: separator + released for stem, released in names.items()}


def test_the_released_layers_are_what_diffusers_reads_of_a_released_checkpoint(
    family, name, tmp_path
):
    lora = random_lora(family)
    state, names = released_state(lora, family, tmp_path, "")
    # one layer there, which the converter would let pass in three
    assert not [released for released in names.values() if re.search(r"to_[qkv]$", released)]
    checkpoint = {}
    for stem, released in names.items():
        down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
        checkpoint[f"{released}.weight"] = up @ down
    found = CHECKPOINTS[name](checkpoint)
    check(
        {f"transformer.{key.removesuffix('.weight')}": w for key, w in found.items()},
        products(lora),
    )


def from_diffusers(state):
    ends = ".lora_A.weight", ".lora_B.weight"
    stems = [key.removesuffix(ends[0]) for key in state if key.endswith(ends[0])]
    return {stem: state[stem + ends[1]] @ state[stem + ends[0]] for stem in stems}


def without(lora, parts):
    return {name: update for name, update in lora.items() if not any(p in name for p in parts)}


def test_diffusers_reads_our_kohya_file(family, name, tmp_path):
    lora = without(random_lora(family), UNREAD_FROM_KOHYA[name])
    state, _ = released_state(lora, family, tmp_path, "")
    check(from_diffusers(KOHYA[name](state)), products(lora))


def test_comfyuis_files_are_read_as_diffusers_reads_them(family, name, tmp_path):
    """The released names after diffusion_model., as ai-toolkit writes them."""
    lora = without(random_lora(family), NOT_TURNED[name])
    state, names = released_state(lora, family, tmp_path, "diffusion_model.")
    kinds = {"lora_down": "lora_A", "lora_up": "lora_B"}
    renamed = {}
    for key, tensor in state.items():
        stem, _, kind = key.partition(".")
        if kind != "alpha":
            first, _, last = kind.partition(".")
            renamed[f"{names[stem]}.{kinds[first]}.{last}"] = tensor
    check(products(read_state(renamed, family, tmp_path)), products(lora))
    if name in COMFYUI:
        check(from_diffusers(COMFYUI[name](dict(renamed))), products(lora))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "base_model.model.", ""])
def test_diffusers_names_are_read_after_any_programs_prefix(family, tmp_path, prefix):
    lora, state = random_lora(family), {}
    for layer, update in lora.items():
        stem = prefix + layer.removeprefix("transformer.")
        state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"] = update.a, update.b
    assert max_relative_difference(lora, read_state(state, family, tmp_path)) == 0


def test_diffusers_names_with_underscores_are_read(family, tmp_path):
    """As musubi-tuner and OneTrainer write those of several models."""
    for prefix in ("lora_unet_", "lora_transformer_"):
        lora, state = random_lora(family), {}
        for layer, update in lora.items():
            stem = prefix + layer.removeprefix("transformer.").replace(".", "_")
            state[f"{stem}.lora_down.weight"] = update.a
            state[f"{stem}.lora_up.weight"] = update.b
        assert max_relative_difference(lora, read_state(state, family, tmp_path)) == 0


def test_no_name_is_of_two_layers(family):
    names = all_layer_names(family)
    known = {layer for rows in names.values() for layer in rows.layers}
    assert known == adaptable_shapes(family).keys()


def test_the_presets_reach_every_layer_of_the_blocks_but_modulation(settings, family, name):
    denoiser = family.meta_model("transformer")
    found = {}
    for preset in ("attention", "attention+mlp"):
        config = settings(f"lora.target_modules={preset}", family=name).lora
        found[preset] = set(target_layers(denoiser, config, family.facts))
    layers = [layer.removeprefix("transformer.") for layer in adaptable_layers(family)]
    own = {layer for layer in layers if family.facts.is_in_block(layer)}
    assert found["attention"] < found["attention+mlp"]
    assert found["attention+mlp"] == {layer for layer in own if "adaLN" not in layer}
    # and each block has some
    blocks = {".".join(layer.split(".")[:2]) for layer in own}
    assert {".".join(layer.split(".")[:2]) for layer in found["attention"]} == blocks


ARCHITECTURES = {
    "flux2_klein": {
        "Flux.2-klein-4b": {"num_attention_heads": 24},
        "Flux.2-klein-9b": {"num_attention_heads": 32},
    },
    "z_image": {"Z-Image": {}},
}


def test_the_file_tells_which_base_it_is_for(family, name, tmp_path, monkeypatch):
    for architecture, sizes in ARCHITECTURES[name].items():
        monkeypatch.setattr(type(family), "denoiser_config", sizes)
        assert base_architecture(family) == architecture
        version = family.facts.kohya.base_model_version
        expected = version if isinstance(version, str) else version[architecture]
        monkeypatch.undo()
        lora = random_lora(family, rank=1, start=f"transformer.{family.facts.blocks[0]}.0.")
        monkeypatch.setattr(type(family), "denoiser_config", sizes)
        load_format("kohya").write(lora, family, tmp_path / "x.safetensors", {})
        assert read_header(tmp_path / "x.safetensors").metadata["ss_base_model_version"] == expected
        monkeypatch.undo()


def test_a_file_for_another_base_is_told_whose_it_may_be(family, bases, tmp_path):
    lora, state = random_lora(family), {}
    for layer, update in lora.items():
        state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = update.a, update.b
    with pytest.raises(UserError, match=rf"Such names are of .*{family.facts.title}"):
        read_state(state, family_of(bases["sd15"], "sd15"), tmp_path)
