"""What is measured in a process of its own: parity with an independent step, FLOPs, the matmul
rate, the overhead.

python check.py CONFIG FAMILY SIZE OUT [KEY=VALUE ...]   started by `accelerate launch` as the
training is
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache
from diffusers import DDPMScheduler, DiffusionPipeline, FluxPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmark import bases
from benchmark.bases import PROMPT, SIZES, TARGETS, Size
from trainers import dreambooth
from trainers.cli import silence_libraries
from trainers.config import DreamBoothConfig, loading
from trainers.data.crops import choose_crop
from trainers.data.rng import SampleRng
from trainers.distributed.accelerator import make_accelerator
from trainers.distributed.trained_weights import trainable_parameters
from trainers.memory_plan import matmul_rate, time_call
from trainers.training.callbacks import LogMetrics
from trainers.training.loop import train
from trainers.training.nonfinite import NonfiniteGuard
from trainers.training.optimizers import make_lr_schedule

BOUNDS = {
    "no": (1e-6, 0.99999),
    "bf16": (1e-3, 0.999),
}  # relative difference of the loss, cosine of the gradients


def main() -> None:
    path, family, size, out, *overrides = sys.argv[1:]
    settings = loading.load_config(path, overrides)
    silence_libraries()
    accelerator, _ = make_accelerator(settings)
    base = Path(settings.model.pretrained_model_name_or_path)
    if not base.exists():
        bases.make_base(family, size, base, accelerator.device)
    clear_device_cache(garbage_collection=True)
    accelerator.init_trackers(settings.tracking.project_name)
    task, batches, _ = dreambooth.build(settings, accelerator)
    result = parity(settings, task, batches, family, accelerator)
    if result["equal"] and not overrides:
        result["flops"] = costs(family, SIZES[family][size])
        dtype = torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16
        result["matmul_tflops"] = matmul_rate(accelerator.device, dtype) / 1e12
        if size == "tiny":
            result["overhead_ms"] = overhead(settings, task, batches, accelerator)
    Path(out).write_text(json.dumps(result))


# Parity


def parity(settings: DreamBoothConfig, task, batches, family: str, accelerator) -> dict:
    """Loss and LoRA gradients of the first batch against a step written from the papers with
    diffusers' own parts.

    Shared are the photos as they were cut, the times and the noise. The reference has its own
    autoencoder, text encoders, denoiser and PEFT layers.
    """
    generator = torch.Generator().manual_seed(5)
    ours = trainable_parameters(task.module.denoiser)
    for parameter in ours.values():  # B starts at zero, where A has no gradient
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator).to(
            parameter.device
        )
    batch, rng = next(iter(batches(0)))
    task.module.train()
    ((_, loss),) = task.losses(batch, rng)
    loss.backward()

    device, dtype = accelerator.device, task.family.dtype
    pipe = DiffusionPipeline.from_pretrained(
        settings.model.pretrained_model_name_or_path, dtype=dtype
    )
    pipe.vae.float()
    pipe.to(device)
    rng = SampleRng(settings.seed, 0, rng.rows, device, batches.batch_slice.global_batch_size)
    names = batches.sample_names(0)[0]
    pictures = [next(p for p in batches.pools[0] if p.name == name) for name in names]
    pixels = torch.stack([choose_crop(p, 0, settings.data)(p.decode()) for p in pictures]).to(
        device
    )
    with torch.no_grad():
        latent = torch.cat(
            [pipe.vae.encode(picture[None]).latent_dist.parameters for picture in pixels]
        )
        mean, logvar = latent.chunk(2, dim=1)
        x0 = mean + (0.5 * logvar).exp() * rng.normal(mean.shape)
        x0 = (x0 - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
        eps, t = rng.normal(x0.shape), task.objective.times(rng)
        text = [encode(pipe, family, [PROMPT], settings) for _ in x0]
        text = [torch.cat(parts) for parts in zip(*text, strict=True)]
    denoiser = (pipe.unet if family == "sd15" else pipe.transformer).requires_grad_(False).train()
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not denoiser:
            part.cpu()
    add_lora(denoiser, family, settings.lora.rank)
    reference = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    for name, parameter in reference.items():
        parameter.data = ours[name].detach().clone()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output, target = predict(pipe, denoiser, family, x0, eps, t, text, dtype)
    expected = F.mse_loss(output.float(), target)
    expected.backward()

    difference = abs(loss.item() / expected.item() - 1)
    our_gradients, reference_gradients = (
        torch.cat([part[name].grad.flatten().double() for name in reference])
        for part in (ours, reference)
    )
    cosine = F.cosine_similarity(our_gradients, reference_gradients, dim=0).item()
    bound, minimum = BOUNDS[accelerator.mixed_precision]
    same = ours.keys() == reference.keys() and difference <= bound and cosine >= minimum
    task.module.zero_grad()
    return {
        "equal": same,
        "loss": loss.item(),
        "loss_difference": difference,
        "gradient_cosine": cosine,
    }


def encode(
    pipe: DiffusionPipeline, family: str, prompts: list[str], settings: DreamBoothConfig
) -> list[Tensor]:
    if family == "sd15":
        return [pipe.encode_prompt(prompts, pipe.device, 1, False)[0]]
    length = settings.model.max_sequence_length
    if family == "flux":
        return list(pipe.encode_prompt(prompts, max_sequence_length=length)[:2])
    states = pipe.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return [states[0], states[2]]


def predict(pipe, denoiser, family, x0, eps, t, text, dtype) -> tuple[Tensor, Tensor]:
    """The denoiser's output and what it regresses: eps (Ho et al. 2020), or eps - x0 (Esser et al.
    2024)."""
    if family == "sd15":
        x_t = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, eps, t)
        return denoiser(x_t.to(dtype), t, text[0]).sample, eps
    s = t.view(-1, 1, 1, 1)
    x_t = ((1 - s) * x0 + s * eps).to(dtype)
    if family == "sd3":
        return denoiser(x_t, text[0], text[1], 1000 * t).sample, eps - x0
    n, c, h, w = x_t.shape
    output = denoiser(
        FluxPipeline._pack_latents(x_t, n, c, h, w),
        text[0],
        text[1],
        t,
        FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, t.device, dtype),
        torch.zeros(text[0].shape[1], 3, device=t.device, dtype=dtype),
        torch.ones_like(t),
    ).sample
    return FluxPipeline._unpack_latents(output, 8 * h, 8 * w, 8), eps - x0


def add_lora(denoiser: nn.Module, family: str, rank: int) -> None:
    denoiser.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS[family]
        )
    )


# FLOPs


def costs(family: str, size: Size, rank: int = 16) -> dict[str, float]:
    """FLOPs for one picture, counted on the meta device with attention as plain matrix products.

    denoiser: forward and backward of the LoRA step; vae, text: forward.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        parts = bases.make_parts(family, size)
        clips = ["text_encoder", "text_encoder_2"] if family == "sd3" else ["text_encoder"]
        t5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}.get(family)
        words = {name: 77 for name in clips} | ({t5: size.t5_tokens} if t5 else {})
        encoders = [
            (parts[name], torch.zeros(1, length, dtype=torch.long))
            for name, length in words.items()
        ]
        denoiser = (parts.get("unet") or parts["transformer"]).requires_grad_(False)
        add_lora(denoiser, family, rank)
        settings, side, text = denoiser.config, size.resolution // 8, size.t5_tokens
        if family == "sd15":
            inputs = [
                torch.zeros(1, 4, side, side),
                torch.zeros(1),
                torch.zeros(1, 77, size.clip[0]),
            ]
        elif family == "sd3":
            shapes = (
                (1, 16, side, side),
                (1, 77 + text, settings.joint_attention_dim),
                (1, settings.pooled_projection_dim),
            )
            inputs = [*map(torch.zeros, shapes), torch.zeros(1)]
        else:
            n = side * side // 4
            shapes = (
                (1, n, 64),
                (1, text, size.t5[0]),
                (1, size.clip[0]),
                (1,),
                (n, 3),
                (text, 3),
                (1,),
            )
            inputs = [*map(torch.zeros, shapes)]
        return {
            "denoiser": flops(lambda: denoiser(*inputs)[0].sum().backward()),
            "vae": flops(
                lambda: parts["vae"].encode(torch.zeros(1, 3, size.resolution, size.resolution))
            ),
            "text": sum(flops(lambda m=module, i=ids: m(i)) for module, ids in encoders),
        }


def flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# Overhead


def overhead(
    settings: DreamBoothConfig, task, batches, accelerator, chunks: int = 40, steps: int = 10
) -> dict[str, float]:
    """Milliseconds per step of the loop with its log and its guard, and of forward, backward and
    AdamW alone, in turns.

    Medians of both and of what one turn of the loop takes over the bare one after it. Both are on
    the same module; the bare step has one batch, noisy already.
    """
    batch, rng = next(iter(batches(0)))
    with torch.no_grad():
        x0 = task.family.latents(batch["moments"], rng)
        eps, t = rng.normal(x0.shape), task.objective.times(rng)
        x_t, target = task.objective.corrupt(x0, eps, t), task.objective.target(x0, eps, t)
    module, lengths = task.players["denoiser"].module, {"loop": [], "bare": []}
    optimizer = torch.optim.AdamW(trainable_parameters(task.module).values(), lr=1e-4, fused=True)
    rate = make_lr_schedule(settings.optimizer, settings.train.max_train_steps)
    callbacks = [
        NonfiniteGuard(task, batches, settings, accelerator),
        LogMetrics(settings, accelerator, rate, 0),
    ]

    def loop(chunk: int) -> None:
        once = settings.train.model_copy(update={"max_train_steps": (chunk + 1) * steps})
        train(task, batches, once, settings.seed, accelerator, rate, callbacks, chunk * steps)

    def bare(chunk: int) -> None:
        for _ in range(steps):
            F.mse_loss(module(x_t, t, batch["text"]).float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    for chunk in range(chunks):
        for name, part in (("loop", loop), ("bare", bare)):
            lengths[name].append(
                1000 * time_call(lambda p=part, c=chunk: p(c), accelerator.device) / steps
            )
    lengths["over"] = [
        loop - bare for loop, bare in zip(lengths["loop"], lengths["bare"], strict=True)
    ]
    return {name: statistics.median(values[chunks // 4 :]) for name, values in lengths.items()}


if __name__ == "__main__":
    diffusers.utils.logging.disable_progress_bar()
    main()
