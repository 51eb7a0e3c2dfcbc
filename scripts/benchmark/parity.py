"""Whether our step is the step of the papers: its loss and its gradients beside a reference's.

Shared are the photos as they were cut, the times and the noise. The reference has its own
autoencoder, text encoders, denoiser and PEFT layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmark.sizes import PROMPT, TARGETS
from reference import step
from trainers.config import DreamBoothConfig
from trainers.data.crops import choose_crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.rng import SampleRng
from trainers.distributed.trained_weights import trainable_parameters
from trainers.dreambooth import DreamBooth

# by mixed precision: the loss's relative difference, and the cosine of the gradients
BOUNDS = {"no": (1e-6, 0.99999), "bf16": (1e-3, 0.999)}

Parameters = dict[str, nn.Parameter]


def parity(
    settings: DreamBoothConfig,
    task: DreamBooth,
    batches: DreamBoothBatches,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """How far the first batch's loss and LoRA gradients are from the reference's."""
    ours = trainable_parameters(task.module.denoiser)
    move_from_zero(ours)
    batch, rng = next(iter(batches(0)))
    task.module.train()
    ((_, loss),) = task.losses(batch, rng)
    loss.backward()
    again = SampleRng(
        settings.seed, 0, rng.rows, accelerator.device, batches.batch_slice.global_batch_size
    )
    pixels = first_pixels(settings, batches).to(accelerator.device)
    expected, reference = reference_step(settings, task, pixels, again, ours)
    difference = abs(loss.item() / expected.item() - 1)
    gradients = [joined_gradients(parameters, reference) for parameters in (ours, reference)]
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    task.module.zero_grad()
    bound, minimum = BOUNDS[accelerator.mixed_precision]
    is_equal = difference <= bound and cosine >= minimum
    return {
        "equal": is_equal and ours.keys() == reference.keys(),
        "loss": loss.item(),
        "loss_difference": difference,
        "gradient_cosine": cosine,
    }


def move_from_zero(parameters: Parameters) -> None:
    """Add noise to the weights: LoRA's B starts at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * noise.to(parameter.device)


def first_pixels(settings: DreamBoothConfig, batches: DreamBoothBatches) -> Tensor:
    """The photos (B, 3, S, S) of the first batch, as the task cuts them."""
    pictures = {picture.name: picture for picture in batches.pools[0]}
    pixels, size = [], batches.bucket(0)[0].size
    for name in batches.sample_names(0)[0]:
        picture = pictures[name]
        pixels.append(choose_crop(picture, 0, size, settings.data)(picture.decode()))
    return torch.stack(pixels)


def joined_gradients(parameters: Parameters, names: Parameters) -> Tensor:
    return torch.cat([parameters[name].grad.flatten().double() for name in names])


def reference_step(
    settings: DreamBoothConfig,
    task: DreamBooth,
    pixels: Tensor,
    rng: SampleRng,
    weights: Parameters,
) -> tuple[Tensor, Parameters]:
    """The reference's loss, and its LoRA parameters with their gradients.

    pixels: (B, 3, S, S) in -1..1. weights: what its LoRA starts from, by PEFT's names.
    """
    family, dtype, device = settings.model.family, task.family.dtype, pixels.device
    base = settings.model.pretrained_model_name_or_path
    pipe = DiffusionPipeline.from_pretrained(base, dtype=dtype)
    pipe.vae.float()
    pipe.to(device)
    with torch.no_grad():
        x0 = draw_latents(pipe, pixels, rng)
        objective = task.objective(x0.shape[-2:])
        eps, t = rng.normal(x0.shape), objective.times(rng)
        length = settings.model.max_sequence_length
        rows = [step.encode(pipe, family, PROMPT, length) for _ in x0]
        text = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    denoiser = (pipe.unet if family == "sd15" else pipe.transformer).requires_grad_(False).train()
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not denoiser:
            part.cpu()
    step.add_lora(denoiser, settings.lora.rank, TARGETS[family])
    reference = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    for name, parameter in reference.items():
        parameter.data = weights[name].detach().clone()
    x_t, target = step.corrupt(family, pipe.scheduler.config, x0, eps, t)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = step.call_denoiser(family, denoiser, x_t.to(dtype), t, text)
    loss = F.mse_loss(output.float(), target)
    loss.backward()
    return loss, reference


def draw_latents(pipe: DiffusionPipeline, pixels: Tensor, rng: SampleRng) -> Tensor:
    """A draw (B, C, h, w) from the autoencoder's posteriors, in the denoiser's units."""
    posteriors = [pipe.vae.encode(picture[None]).latent_dist for picture in pixels]
    mean, logvar = torch.cat([found.parameters for found in posteriors]).chunk(2, dim=1)
    x0 = mean + (0.5 * logvar).exp() * rng.normal(mean.shape)
    return (x0 - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
