"""Pictures by a family's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL.Image import Image
from torch import Tensor

from trainers.config import DreamBoothConfig, PromptsConfig
from trainers.data.buckets import Size
from trainers.data.imaging import write_grid, write_picture
from trainers.distributed.collectives import run_across_processes
from trainers.families import Family
from trainers.run_folder import GRID_NAME

PromptEncoder = Callable[[str, str], dict[str, Tensor]]  # a text encoder's name, and a prompt


@torch.no_grad()
def sample_picture(  # noqa: PLR0913 (all that a picture depends on)
    family: Family,
    prompt: str,
    validation: PromptsConfig,
    seed: int,
    size: Size,
    encode: PromptEncoder | None = None,
) -> Image:
    """One picture, by the pipeline that the family holds.

    size: its width and height in pixels; encode: is called instead of the loaded text encoders.
    """
    encode = encode or family.encode_prompt
    arguments = encode_for_pipeline(family, prompt, encode)
    negative = validation.negative_prompt
    # some pipelines take zeros for an empty prompt, and nothing that it is encoded to
    if negative or not family.pipe.config.get("force_zeros_for_empty_prompt"):
        for name, value in encode_for_pipeline(family, negative, encode).items():
            arguments[f"negative_{name}"] = value
    device, dtype = family.device.type, family.dtype
    is_half = dtype != torch.float32
    with decoder_precision(family), torch.autocast(device, dtype, enabled=is_half):
        picture = family.pipe(
            **arguments,
            width=size[0],
            height=size[1],
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
            # on the CPU, so that every device starts from the same noise
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
    return picture


@contextmanager
def decoder_precision(family: Family) -> Iterator[None]:
    """The autoencoder decodes in the base's precision, in which the pipeline hands it latents.

    In float16 it stays in float32 instead: those of several families overflow to black pictures.
    """
    vae = family.pipe.vae
    if family.dtype != torch.float16:
        vae.to(family.dtype)
        yield
        vae.float()
        return
    decode = vae.decode

    def decode_in_full(latents: Tensor, **options: bool) -> Any:
        with torch.autocast(family.device.type, enabled=False):
            return decode(latents.float(), **options)

    vae.decode = decode_in_full
    try:
        yield
    finally:
        del vae.decode


def encode_for_pipeline(family: Family, prompt: str, encode: PromptEncoder) -> dict[str, Tensor]:
    """The keyword arguments (1, ...) by which the pipeline takes an encoded prompt."""
    text = {}
    for name in family.text_encoder_names:
        for key, value in encode(name, prompt).items():
            text[key] = value[None].to(family.device)
    return family.pipeline_arguments(family.condition(text))


def with_lora_scale(family: Family, scale: float | None, sample: Callable[[], Image]) -> Image:
    """What `sample` gives while the LoRA in all loaded parts is `scale` times as strong."""
    if scale is None:
        return sample()
    layers = lora_layers(family)
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        return sample()
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def without_lora(family: Family) -> Iterator[None]:
    """Inside, the loaded parts are those of the base."""
    layers = lora_layers(family)
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def lora_layers(family: Family) -> list[BaseTunerLayer]:
    """Those of all parts of the pipeline that are loaded."""
    names = family.denoiser_name, *family.text_encoder_names
    parts = [part for name in names if (part := getattr(family.pipe, name)) is not None]
    modules = [module for part in parts for module in part.modules()]
    return [module for module in modules if isinstance(module, BaseTunerLayer)]


def write_samples(
    family: Family,
    config: DreamBoothConfig,
    folder: Path,
    encode: PromptEncoder | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Write each validation prompt's pictures as PROMPT-IMAGE.png, and all of them in grid.png.

    accelerator: of the processes that sample together, of which the main one writes.
    """
    validation, side = config.validation, config.data.max_resolution
    jobs = []
    for sample in validation.samples:
        own = validation.with_own(sample)
        for i in range(validation.num_images):
            settings = own, own.seed + i, sample.sides(side), encode
            picture = partial(sample_picture, family, sample.prompt, *settings)
            jobs.append(partial(with_lora_scale, family, sample.lora_scale, picture))
    generated = run_across_processes(jobs, accelerator) if accelerator else [job() for job in jobs]
    if accelerator and not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, sample in enumerate(validation.samples):
        first = number * validation.num_images
        row = generated[first : first + validation.num_images]
        rows.append((sample.caption, row))
        for i, picture in enumerate(row):
            write_picture(picture, folder / f"{number:02d}-{i}.png")
    write_grid(rows, folder / GRID_NAME)
