"""A training step written from the papers, with diffusers' and PEFT's own parts.

Times t (B,) are the index 0..999 of a DDPM step for the U-Nets of SD1.5 and SDXL, and 0..1 with 1
as noise for the flows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig
from torch import Tensor, nn


def encode(
    pipe: DiffusionPipeline, family: str, prompt: str, max_sequence_length: int | None
) -> list[Tensor]:
    """What the denoiser takes of a prompt (1, ...): its tokens and, but for SD1.5, a pooled vector.

    max_sequence_length: the tokens that the T5 reads, where the pipeline has one.
    """
    if family == "sd15":
        return [pipe.encode_prompt([prompt], pipe.device, 1, False)[0]]
    if family == "sdxl":
        tokens, _, pooled, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False)
        return [tokens, pooled]
    if family == "flux":
        return list(pipe.encode_prompt([prompt], max_sequence_length=max_sequence_length)[:2])
    tokens, _, pooled, _ = pipe.encode_prompt(
        [prompt],
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return [tokens, pooled]


def draw_times(family: str, scheduler: dict[str, Any], u: Tensor, side: int) -> Tensor:
    """Times (B,) from uniform u (B,): even ones of a DDPM, or logit-normal ones of a flow.

    A flow's are shifted as its pipeline's own sampler shifts latents of that side (Esser et al.
    2024, section 5.3.2). scheduler: its config.
    """
    if family == "sd15":
        return (scheduler["num_train_timesteps"] * u).long()
    t = torch.sigmoid(torch.special.ndtri(u))
    shift = math.exp(calculate_shift((side // 2) ** 2)) if family == "flux" else scheduler["shift"]
    return shift * t / (1 + (shift - 1) * t)


def corrupt(
    family: str, scheduler_config: dict[str, Any], x0: Tensor, eps: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The noisy latents, and what the denoiser regresses.

    That is eps or the velocity for the U-Nets (Ho et al. 2020, Salimans and Ho 2022), as the
    scheduler config says, and eps - x0 for the flows (Esser et al. 2024).
    """
    if family in ("sd15", "sdxl"):
        ddpm = DDPMScheduler.from_config(scheduler_config)
        is_velocity = ddpm.config.prediction_type == "v_prediction"
        target = ddpm.get_velocity(x0, eps, t) if is_velocity else eps
        return ddpm.add_noise(x0, eps, t), target
    s = t.view(-1, 1, 1, 1)
    return (1 - s) * x0 + s * eps, eps - x0


def call_denoiser(
    family: str, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: list[Tensor]
) -> Tensor:
    """The denoiser's output (B, C, h, w) for latents x_t (B, C, h, w) and text as of `encode`.

    SDXL takes the sizes and the crop corner of each picture too, (B, 6) as the last of `text`.
    """
    if family == "sd15":
        return denoiser(x_t, t, text[0]).sample
    if family == "sdxl":
        tokens, pooled, sizes = text
        added = {"text_embeds": pooled, "time_ids": sizes}
        return denoiser(x_t, t, tokens, added_cond_kwargs=added).sample
    if family == "sd3":
        return denoiser(x_t, text[0], text[1], 1000 * t).sample
    n, channels, h, w = x_t.shape
    device, dtype = x_t.device, x_t.dtype
    output = denoiser(
        FluxPipeline._pack_latents(x_t, n, channels, h, w),
        text[0],
        text[1],
        t,
        FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, device, dtype),
        torch.zeros(text[0].shape[1], 3, device=device, dtype=dtype),
        torch.ones_like(t),
    ).sample
    return FluxPipeline._unpack_latents(output, 8 * h, 8 * w, 8)


def add_lora(
    denoiser: nn.Module, rank: int, target_modules: list[str], alpha: float | None = None
) -> None:
    """Put PEFT's LoRA layers into the denoiser; alpha is the rank by default."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        init_lora_weights="gaussian",
        target_modules=target_modules,
    )
    denoiser.add_adapter(config)
