"""Formats convert into each other exactly, with the scales that others write."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from tests.shared.saved_loras import ALL, check, family_of, products, random_lora
from trainers.config.family_facts import family_facts
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.lora import diffusers_format, peft_format
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.files import read_lora
from trainers.lora.formats import FORMATS, detect_format, load_format
from trainers.lora.kohya import from_kohya, kohya_names, swapped_layers, to_kohya
from trainers.lora.update import LoraUpdate, max_relative_difference
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_recognizes_what_it_writes(bases, tmp_path, name):
    family = family_of(bases["sd15"], "sd15")
    layers = dict(list(adaptable_layers(family).items())[:1])
    lora = random_lora(layers, dict.fromkeys(layers, (3,)))
    out = tmp_path / f"out{load_format(name).SUFFIX}"
    load_format(name).write(lora, family, out, {})
    assert detect_format(out) is load_format(name)


def test_a_path_where_nothing_is_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        detect_format(tmp_path / "absent")


def test_a_new_format_is_a_module_and_a_row(bases, tmp_path, monkeypatch):
    """Its module need not lie in the package."""
    family = family_of(bases["sd15"], "sd15")
    layer = next(iter(adaptable_layers(family)))
    lora = {layer: LoraUpdate(torch.ones(1, 3), torch.ones(2, 1))}
    module = SimpleNamespace(
        SUFFIX=".new",
        recognizes=lambda path: path.suffix == ".new",
        read=lambda path, family: (lora, []),
    )
    monkeypatch.setitem(sys.modules, "new_format", module)
    rows = {"new": "new_format", **FORMATS}
    monkeypatch.setattr("trainers.lora.formats.FORMATS", rows)
    assert read_lora(tmp_path / "file.new", family) == lora


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [(2,), (1, 3, 2)], ids=["one rank", "several"])
@pytest.mark.parametrize("wanted", ["", "to_q", "to_v", "proj_mlp", "ff"])
def test_kohya_and_back_is_exact_with_whole_and_with_partly_trained_layers(
    bases, name, ranks, wanted
):
    layers = adaptable_layers(family_of(bases[name], name))
    chosen = {key: outputs for key, outputs in layers.items() if wanted in key}
    lora = random_lora(chosen, dict.fromkeys(chosen, (3,)), ranks=ranks)
    kohya = family_facts(name).kohya
    back, unknown = from_kohya(to_kohya(lora, layers, kohya), layers, kohya)
    assert not unknown
    assert back.keys() == lora.keys()
    for key, update in lora.items():
        assert torch.equal(back[key].a, update.a)
        assert torch.equal(back[key].b, update.b)


def test_layers_that_share_their_first_half_stay_as_small_as_they_were():
    layers = {f"transformer.transformer_blocks.0.attn.to_{x}": 4 for x in "qkv"}
    a = torch.randn(2, 3)
    lora = {name: LoraUpdate(a, torch.randn(4, 2)) for name in layers}
    assert to_kohya(lora, layers, family_facts("flux").kohya)[
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    ].shape == (2, 3)
    kohya = family_facts("flux").kohya
    back, _ = from_kohya(to_kohya(lora, layers, kohya), layers, kohya)
    assert max_relative_difference(lora, back) == 0


@pytest.mark.parametrize("name", ALL)
def test_no_two_layers_share_a_name_and_none_is_left_out(bases, name):
    layers = adaptable_layers(family_of(bases[name], name))
    names = kohya_names(layers, family_facts(name).kohya)
    parts = [part for parts in names.values() for part in parts]
    assert len(parts) == len(set(parts))
    assert layers.keys() <= set(parts)
    assert swapped_layers(layers, family_facts(name).kohya) <= layers.keys() | {""}


@pytest.mark.parametrize("alpha", ["metadata", "beside"])
def test_a_scale_is_read_where_others_write_it(made, bases, tmp_path, alpha):
    """diffusers keeps alpha in the header, others in a tensor NAME.alpha."""
    folder, updates = made["sd3"]
    state, metadata = load_file(folder / WEIGHT_NAME), {"format": "pt"}
    stems = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    if alpha == "beside":
        state |= {f"{stem}.alpha": torch.tensor(3.0) for stem in stems}
    else:
        metadata["lora_adapter_metadata"] = json.dumps(
            {
                f"{part}.{key}": value
                for part in (*FAMILIES["sd3"].clip_encoders, "transformer")
                for key, value in {"r": 2, "lora_alpha": 3}.items()
            }
        )
    save_file(state, tmp_path / "file.safetensors", metadata)
    found = products(read_lora(tmp_path / "file.safetensors", family_of(bases["sd3"], "sd3")))
    check(found, {name: 1.5 * product for name, product in updates.items()})


def test_kohyas_alpha_is_read(made, bases, tmp_path):
    folder, updates = made["sd15"]
    state = load_file(folder / KOHYA_NAME)
    state |= {key: 3 * value for key, value in state.items() if key.endswith(".alpha")}
    save_file(state, tmp_path / "file.safetensors")
    found = products(read_lora(tmp_path / "file.safetensors", family_of(bases["sd15"], "sd15")))
    check(found, {name: 3 * product for name, product in updates.items()})


def test_layers_of_several_ranks_keep_theirs_in_diffusers_and_peft(bases, tmp_path):
    family = family_of(bases["sd3"], "sd3")
    family.load("transformer")
    weights = {
        f"transformer.{n}": m.weight
        for n, m in family.denoiser.named_modules()
        if isinstance(m, nn.Linear)
    }
    layers = {name: len(weight) for name, weight in weights.items()}
    lora = random_lora(
        layers, {name: weight.shape[1:] for name, weight in weights.items()}, ranks=(1, 3, 2)
    )
    diffusers_format.write(lora, family, tmp_path / WEIGHT_NAME, {})
    peft_format.write(lora, family, tmp_path, {})
    peft = PeftModel.from_pretrained(
        DiffusionPipeline.from_pretrained(bases["sd3"]).transformer, tmp_path / "transformer"
    )
    family.pipe.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)
    for module in (peft.base_model.model, family.denoiser):
        found = {}
        for name, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                (adapter,) = layer.active_adapters
                found[f"transformer.{name}"] = layer.get_delta_weight(adapter).detach()
        check(found, products(lora))
