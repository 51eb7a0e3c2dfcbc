"""FLOPs for one picture, counted on the meta device with attention as plain matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmark import bases
from benchmark.sizes import CLIP_TOKENS, RANK, TARGETS, Size, condition_shapes, latent_shape
from reference.step import add_lora, call_denoiser


def costs(family: str, size: Size) -> dict[str, float]:
    """FLOPs of the parts.

    denoiser: forward and backward of the LoRA step; vae, text: forward.
    """
    pixels = (1, 3, size.resolution, size.resolution)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        parts = bases.make_parts(family, size)
        text_flops = 0
        for name, length in text_lengths(family, size).items():
            ids = torch.zeros(1, length, dtype=torch.long)
            text_flops += count_flops(parts[name], ids)
        return {
            "denoiser": step_flops(family, size),
            "vae": count_flops(parts["vae"].encode, torch.zeros(pixels)),
            "text": text_flops,
        }


def step_flops(family: str, size: Size) -> float:
    """FLOPs of the forward and backward pass of the LoRA step, for one picture."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        denoiser = bases.new_denoiser(family, size)
        denoiser.requires_grad_(False)
        add_lora(denoiser, RANK, TARGETS[family])
        x_t = torch.zeros(1, *latent_shape(family, size))
        text = [torch.zeros(shape) for shape in condition_shapes(family, size, 1).values()]

        def train_step() -> None:
            call_denoiser(family, denoiser, x_t, torch.zeros(1), text).sum().backward()

        return count_flops(train_step)


def text_lengths(family: str, size: Size) -> dict[str, int]:
    """How many tokens each text encoder reads."""
    lengths = {"text_encoder": CLIP_TOKENS}
    if family == "sd3":
        lengths |= {"text_encoder_2": CLIP_TOKENS, "text_encoder_3": size.t5_tokens}
    if family == "flux":
        lengths["text_encoder_2"] = size.t5_tokens
    return lengths


def count_flops(call: Callable[..., object], *arguments: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()
