"""A frozen base in 8 or 4 bits, with LoRA in float32 on top (QLoRA: Dettmers et al. 2023)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from trainers.errors import UserError


def load_quantized(
    model_class: type,
    folder: Path,
    subfolder: str,
    variant: str | None,
    dtype: torch.dtype,
    method: str,
) -> nn.Module:
    """The model `folder`/`subfolder` of class `model_class` with its linear layers in nf4 or int8.

    On a CUDA device through diffusers' own loader, weight by weight. It refuses a CPU: there they
    are put in here.
    """
    source = {"subfolder": subfolder, "variant": variant, "torch_dtype": dtype}
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(
        logging.ERROR
    )  # int8: a line for each layer call
    if torch.cuda.is_available():
        from diffusers import BitsAndBytesConfig

        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        config = BitsAndBytesConfig(**nf4 if method == "nf4" else {"load_in_8bit": True})
        return model_class.from_pretrained(folder, **source, quantization_config=config)
    if torch.accelerator.is_available():
        raise UserError(f"model.quantization: {method} needs CUDA or a CPU here; use fp8 or none")
    return replace_linears(model_class.from_pretrained(folder, **source), method)


def replace_linears(model: nn.Module, method: str) -> nn.Module:
    """Put bitsandbytes' layers in place of the linear layers inside the model's blocks; for a
    CPU."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or "blocks." not in name:
            continue
        shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if method == "nf4":
            quantized = Linear4bit(*shape, bias, compute_dtype=layer.weight.dtype, quant_type="nf4")
            quantized.weight = Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized
            )
            quantized.support_avx512bf16_for_cpu = (
                False  # its packed weights cannot go back to training
            )
        else:
            quantized = Linear8bitLt(*shape, bias, has_fp16_weights=False)
            quantized.weight = Int8Params(layer.weight.data, requires_grad=False)
        quantized.bias = layer.bias
        model.set_submodule(name, quantized.to("cpu"))
    setattr(
        model, "is_loaded_in_4bit" if method == "nf4" else "is_loaded_in_8bit", True
    )  # PEFT asks
    return model
