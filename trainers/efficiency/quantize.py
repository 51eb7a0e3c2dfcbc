"""A frozen base in 8 or 4 bits, with LoRA in float32 on top (QLoRA: Dettmers et al. 2023)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from trainers.errors import UserError
from trainers.families import Family


def load_quantized(family: Family, model_class: type, method: str) -> nn.Module:
    """The denoiser of a family, of class `model_class`, with its linear layers in nf4 or int8.

    On a CUDA device through diffusers' own loader, weight by weight. It refuses a CPU: there they
    are put in here. Raises: UserError on any other device.
    """
    folder, dtype = family.folder, family.dtype
    source = {"subfolder": family.denoiser_name, "variant": family.variant, "torch_dtype": dtype}
    source["use_safetensors"] = True
    # with int8 there is a line for each call of a layer
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if torch.cuda.is_available():
        from diffusers import BitsAndBytesConfig

        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        config = BitsAndBytesConfig(**nf4 if method == "nf4" else {"load_in_8bit": True})
        return model_class.from_pretrained(folder, **source, quantization_config=config)
    if torch.accelerator.is_available():
        raise UserError(f"model.quantization: {method} needs CUDA or a CPU here; use fp8 or none")
    model = model_class.from_pretrained(folder, **source)
    names = [name for name, _ in model.named_modules() if family.facts.is_in_block(name)]
    return replace_linears(model, names, method)


def replace_linears(model: nn.Module, names: Sequence[str], method: str) -> nn.Module:
    """Put bitsandbytes' layers in place of those of the named modules that are linear."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            continue
        shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if method == "nf4":
            quantized = Linear4bit(*shape, bias, compute_dtype=layer.weight.dtype, quant_type="nf4")
            quantized.weight = Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized
            )
            # weights that are packed for it cannot go back to training
            quantized.support_avx512bf16_for_cpu = False
        else:
            quantized = Linear8bitLt(*shape, bias, has_fp16_weights=False)
            quantized.weight = Int8Params(layer.weight.data, requires_grad=False)
        quantized.bias = layer.bias
        model.set_submodule(name, quantized.to("cpu"))
    # PEFT asks for it to choose its own layer
    setattr(model, "is_loaded_in_4bit" if method == "nf4" else "is_loaded_in_8bit", True)
    return model
