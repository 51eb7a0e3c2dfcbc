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

from tests.shared.lora_files import denoiser_names
from tests.shared.saved_loras import ALL, check, family_of, products, random_lora
from trainers.config.family_facts import family_facts
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.lora import diffusers_format, kohya, peft_format
from trainers.lora.base_layers import adaptable_layers, adaptable_shapes
from trainers.lora.files import read_lora
from trainers.lora.formats import READ_FORMATS
from trainers.lora.kohya import to_kohya
from trainers.lora.update import LoraUpdate, Rows, max_relative_difference, split_update
from trainers.original.names import swapped_layers
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME


def test_a_path_where_nothing_is_is_the_users_mistake(bases, tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_lora(tmp_path / "absent", family_of(bases["sd15"], "sd15"))


def test_a_new_format_is_a_module_and_a_row(bases, tmp_path, monkeypatch):
    """Its module need not lie in the package."""
    family = family_of(bases["sd15"], "sd15")
    layer = "unet.down_blocks.0.attentions.0.proj_in"
    module = SimpleNamespace(layer_names=lambda family: {"anything": Rows((layer,))})
    monkeypatch.setitem(sys.modules, "new_format", module)
    monkeypatch.setitem(READ_FORMATS, "new", "new_format")
    state = {"anything.lora_A": torch.ones(1, 8, 1, 1), "anything.lora_B": torch.ones(8, 1, 1, 1)}
    save_file(state, tmp_path / "file.safetensors")
    found = read_lora(tmp_path / "file.safetensors", family)
    assert found.keys() == {layer}
    assert torch.equal(found[layer].delta_weight(), torch.ones(8, 8))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [(2,), (1, 3, 2)], ids=["one rank", "several"])
@pytest.mark.parametrize("wanted", ["", "to_q", "to_v", "mlp", "ff"])
def test_kohya_and_back_is_exact_with_whole_and_with_partly_trained_layers(
    bases, tmp_path, name, ranks, wanted
):
    family = family_of(bases[name], name)
    shapes = adaptable_shapes(family)
    chosen = {key: shape for key, shape in shapes.items() if wanted in key}
    lora = random_lora(
        {key: shape[0] for key, shape in chosen.items()},
        {key: shape[1:] for key, shape in chosen.items()},
        ranks=ranks,
    )
    kohya.write(lora, family, tmp_path / KOHYA_NAME, {})
    back = read_lora(tmp_path / KOHYA_NAME, family)
    assert back.keys() == lora.keys()
    for key, update in lora.items():
        assert torch.equal(back[key].a, update.a)
        assert torch.equal(back[key].b, update.b)


def test_layers_that_share_their_first_half_stay_as_small_as_they_were():
    layers = {f"transformer.transformer_blocks.0.attn.to_{x}": 4 for x in "qkv"}
    a = torch.randn(2, 3)
    lora = {name: LoraUpdate(a, torch.randn(4, 2)) for name in layers}
    state = to_kohya(lora, layers, denoiser_names(layers, "flux"))
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert state[f"{stem}.lora_down.weight"].shape == (2, 3)
    whole = LoraUpdate(state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"])
    back = dict(zip(layers, split_update(whole, list(layers.values())), strict=True))
    assert max_relative_difference(lora, back) == 0


@pytest.mark.parametrize("name", ALL)
def test_no_two_layers_share_a_name_and_none_is_left_out(bases, name):
    family = family_of(bases[name], name)
    layers = adaptable_layers(family)
    parts = [part for rows in kohya.written_names(family, layers).values() for part in rows.layers]
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
