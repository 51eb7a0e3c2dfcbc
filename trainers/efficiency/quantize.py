"""A frozen base in 8 or 4 bits, with LoRA in float32 on top (QLoRA: Dettmers et al. 2023)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from trainers.data.file_digests import part_files
from trainers.errors import UserError
from trainers.families import Family
from trainers.tensor_file import open_safetensors


def load_quantized(family: Family, model_class: type, method: str) -> nn.Module:
    """The denoiser of a family, of class `model_class`, with its linear layers in nf4 or int8.

    On a CUDA device through diffusers' own loader, weight by weight. It refuses a CPU: there each
    layer is put in here as it is read. Raises: UserError on any other device.
    """
    # with int8 there is a line for each call of a layer
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        from diffusers import BitsAndBytesConfig

        folder, dtype = family.folder, family.dtype
        source = {"subfolder": family.denoiser_name, "variant": family.variant}
        source |= {"torch_dtype": dtype, "use_safetensors": True}
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        config = BitsAndBytesConfig(**nf4 if method == "nf4" else {"load_in_8bit": True})
        return model_class.from_pretrained(folder, **source, quantization_config=config)
    if torch.accelerator.is_available():
        raise UserError(f"model.quantization: {method} needs CUDA or a CPU here; use fp8 or none")
    return load_layer_by_layer(family, model_class, method)


def load_layer_by_layer(family: Family, model_class: type, method: str) -> nn.Module:
    """The denoiser on the CPU; of what is not quantized yet, one layer at a time is in memory.

    Raises: UserError where a weight is missing.
    """
    folder = family.folder / family.denoiser_name
    with init_empty_weights():
        model = model_class.from_config(model_class.load_config(folder))
    files = tensor_files(folder, family.variant)
    if missing := sorted(model.state_dict().keys() - files.keys()):
        raise UserError(
            f"model.pretrained_model_name_or_path: the weights in {folder} lack {len(missing)} "
            f"tensors, for example {missing[0]}: fetch the base again"
        )
    for layer_name, keys in keys_by_layer(model).items():
        for key in keys:
            read_tensor(model, key, files[key], family.dtype)
        if family.facts.is_in_block(layer_name):
            replace_linears(model, [layer_name], method)
    return model


def read_tensor(model: nn.Module, key: str, path: Path, dtype: torch.dtype) -> None:
    """Put one tensor of a file into a model. Raises: UserError where its shape is another."""
    # a file is opened anew for each tensor, or all that was read of it would stay in memory
    with open_safetensors(path) as file:
        value = file.get_tensor(key)
    value = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
    layer_name, _, name = key.rpartition(".")
    layer = model.get_submodule(layer_name)
    expected = getattr(layer, name)
    if value.shape != expected.shape:
        raise UserError(
            f"model.pretrained_model_name_or_path: {key} in {path} is of shape "
            f"{list(value.shape)}, but by config.json it is {list(expected.shape)}: fetch the base "
            "again"
        )
    is_weight = isinstance(expected, nn.Parameter)
    setattr(layer, name, nn.Parameter(value, requires_grad=False) if is_weight else value)


def keys_by_layer(model: nn.Module) -> dict[str, list[str]]:
    """The names of all tensors of a model that files have, by the module that holds them."""
    keys: dict[str, list[str]] = {}
    for key in model.state_dict():
        keys.setdefault(key.rpartition(".")[0], []).append(key)
    return keys


def tensor_files(folder: Path, variant: str | None) -> dict[str, Path]:
    """The file of each tensor of a component; shards come before a file that holds all."""
    files: dict[str, Path] = {}
    for path in sorted(part_files(folder, variant)):
        if path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                for key in file.keys():  # noqa: SIM118, a file is no dictionary
                    files.setdefault(key, path)
    return files


def replace_linears(model: nn.Module, names: Sequence[str], method: str) -> nn.Module:
    """Put bitsandbytes' layers in place of those of the named modules that are linear."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            continue
        shape, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
        has_bias = layer.bias is not None
        if method == "nf4":
            with torch.device("meta"):
                quantized = Linear4bit(*shape, has_bias, compute_dtype=dtype, quant_type="nf4")
            quantized.weight = Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized
            )
            # weights that are packed for it cannot go back to training
            quantized.support_avx512bf16_for_cpu = False
        else:
            with torch.device("meta"):
                quantized = Linear8bitLt(*shape, has_bias, has_fp16_weights=False)
            quantized.weight = Int8Params(layer.weight.data, requires_grad=False)
        quantized.bias = layer.bias
        model.set_submodule(name, quantized.to("cpu"))
    # PEFT asks for it to choose its own layer
    setattr(model, "is_loaded_in_4bit" if method == "nf4" else "is_loaded_in_8bit", True)
    return model
