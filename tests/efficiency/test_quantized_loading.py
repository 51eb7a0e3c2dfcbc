"""A quantized base is read and quantized a layer at a time, to the bit as if whole before."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.shared.families import ALL
from trainers.config import ModelConfig
from trainers.efficiency.apply import open_family
from trainers.efficiency.quantize import load_quantized, replace_linears
from trainers.errors import UserError
from trainers.memory_plan import MemoryMeter

WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = [(family, method) for family in ALL for method in ("nf4", "int8")]


def opened(base, name, dtype=torch.bfloat16):
    """The family of a base, and the class of its denoiser."""
    model = ModelConfig(family=name, pretrained_model_name_or_path=str(base), allow_schnell=True)
    family = open_family(model, dtype=dtype)
    return family, getattr(diffusers, family.components[family.denoiser_name][1])


def cut_in_shards(base, folder, part):
    """A copy of a base, the weights of a part of which are in several files."""
    shutil.copytree(base, folder)
    (folder / part / WEIGHTS).unlink()
    state = load_file(base / part / WEIGHTS)
    names, files = sorted(state), {}
    for number in range(3):
        files[f"diffusion_pytorch_model-0000{number + 1}-of-00003.safetensors"] = names[number::3]
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / part / file, {"format": "pt"})
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / part / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_read_layer_by_layer_it_is_what_it_is_when_quantized_as_a_whole(
    bases, tmp_path, name, method
):
    family, model_class = opened(bases[name], name)
    part = family.denoiser_name
    whole = model_class.from_pretrained(bases[name], subfolder=part, torch_dtype=family.dtype)
    names = [key for key, _ in whole.named_modules() if family.facts.is_in_block(key)]
    expected = replace_linears(whole, names, method)
    cut_in_shards(bases[name], tmp_path / "cut", part)
    family, _ = opened(tmp_path / "cut", name)
    streamed = load_quantized(family, model_class, method)
    assert type_names(streamed) == type_names(expected)
    states = streamed.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        other = states[1][key]
        assert value.dtype == other.dtype, key
        assert torch.equal(value, other), key
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(streamed, flag, None) == getattr(expected, flag, None)


def type_names(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.fixture
def deep_base(bases, tmp_path):
    """A Flux.1 with so many blocks that no layer is much of it."""
    shutil.copytree(bases["flux"], tmp_path / "deep")
    config = json.loads((bases["flux"] / "transformer/config.json").read_text())
    deep = config | {"num_layers": 4, "num_single_layers": 8, "attention_head_dim": 32}
    deep["axes_dims_rope"] = (8, 12, 12)
    diffusers.FluxTransformer2DModel.from_config(deep).save_pretrained(
        tmp_path / "deep/transformer"
    )
    return tmp_path / "deep"


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_no_more_than_a_layer_is_whole_in_memory(deep_base, method):
    family, model_class = opened(deep_base, "flux")
    state = load_file(deep_base / "transformer" / WEIGHTS)
    largest = max(value.numel() for value in state.values()) * family.dtype.itemsize
    whole = sum(value.numel() for value in state.values()) * family.dtype.itemsize
    with MemoryMeter() as meter:
        model = load_quantized(family, model_class, method)
        # as it lies in the file, in the base's precision, and what quantizing makes of it
        assert meter.peak_bytes - meter.live_bytes < 6 * largest
        assert meter.peak_bytes < whole
    assert next(model.parameters()).device.type == "cpu"


def test_a_file_that_is_broken_off_is_told(bases, tmp_path):
    shutil.copytree(bases["flux"], tmp_path / "base")
    path = tmp_path / "base/transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    family, model_class = opened(tmp_path / "base", "flux")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_quantized(family, model_class, "nf4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, key: state.pop(key), "lack 1 tensors, for example"),
        (lambda state, key: state.update({key: state[key][1:]}), "but by config.json it is"),
    ],
)
def test_a_base_with_other_weights_than_its_config_has_is_refused(bases, tmp_path, change, message):
    shutil.copytree(bases["flux"], tmp_path / "base")
    path = tmp_path / "base/transformer" / WEIGHTS
    state = load_file(path)
    change(state, "transformer_blocks.0.attn.to_q.weight")
    save_file(state, path, {"format": "pt"})
    family, model_class = opened(tmp_path / "base", "flux")
    with pytest.raises(UserError, match=message):
        load_quantized(family, model_class, "nf4")
