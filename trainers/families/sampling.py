"""Pictures by a family's pipeline: of the class, for prior preservation, and of the validation
prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from trainers.config import DreamBoothConfig, PromptsConfig
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.imaging import write_grid
from trainers.data.pictures import list_image_files
from trainers.distributed.collectives import run_across_processes, split_between_processes
from trainers.families import Family


@torch.no_grad()
def sample_picture(
    family: Family,
    prompt: str,
    validation: PromptsConfig,
    seed: int,
    size: int,
    encode: Callable[[str, str], dict[str, Tensor]] | None = None,
) -> Image.Image:
    """One picture of `size` pixels by the pipeline that the family holds.

    encode: a text encoder's name and a prompt to its outputs, instead of the loaded encoders.
    """
    arguments = []
    for words in (prompt, validation.negative_prompt):
        text = {}
        for name in family.text_encoder_names:
            text |= (encode or family.encode_prompt)(name, words)
        text = {key: value[None].to(family.device) for key, value in text.items()}
        arguments.append(family.pipeline_arguments(family.condition(text)))
    positive, negative = arguments
    vae, is_half = family.pipe.vae, family.dtype != torch.float32
    if is_half:
        vae.to(family.dtype)
    with torch.autocast(family.device.type, family.dtype, enabled=is_half):
        picture = family.pipe(
            **positive,
            **{f"negative_{key}": value for key, value in negative.items()},
            height=size,
            width=size,
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
    if is_half:
        vae.float()
    return picture


def generate_class_images(
    encoder: CachedEncoder, config: DreamBoothConfig, folder: Path, accelerator: Accelerator
) -> None:
    """Generate the class pictures that the folder lacks, shared among the processes; picture i has
    noise i."""
    family, data = encoder.family, config.data
    missing = data.num_class_images - len(list_image_files(folder))
    names = (folder / f"class-{i:05d}.png" for i in range(data.num_class_images))
    pending = [path for path in names if not path.exists()][: max(0, missing)]
    if pending and data.cache:
        encoder.fill([], [*data.class_prompts, config.validation.negative_prompt], accelerator)
    accelerator.wait_for_everyone()
    for assigned in (split_between_processes(pending, accelerator), pending):
        missing = [
            path for path in assigned if not path.exists()
        ]  # the second time, where disks are not shared
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            family.load("vae", family.denoiser_name, *encoder.loaded_encoders)
            family.apply_memory_options()
            for path in tqdm(missing, "class pictures", disable=not accelerator.is_main_process):
                number = int(path.stem.removeprefix("class-"))
                prompt = data.class_prompts[number % len(data.class_prompts)]
                settings = (config.validation, number, data.resolution, encoder.encoder_outputs)
                picture = sample_picture(family, prompt, *settings)
                path.with_suffix(".txt").write_text(prompt, "utf-8")
                temporary = path.with_name(f".{accelerator.process_index}-{path.name}")
                picture.save(temporary, format="png")
                temporary.replace(path)
            family.unload()
        accelerator.wait_for_everyone()


def write_samples(
    family: Family,
    config: DreamBoothConfig,
    folder: Path,
    encode: Callable | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Each validation prompt's pictures as PROMPT-IMAGE.png, and all of them as one labelled
    grid.png.

    accelerator: processes that share the work; the main one writes.
    """
    validation, size = config.validation, config.data.resolution
    jobs = [
        partial(sample_picture, family, prompt, validation, validation.seed + i, size, encode)
        for prompt in validation.prompts
        for i in range(validation.num_images)
    ]
    generated = run_across_processes(jobs, accelerator) if accelerator else [job() for job in jobs]
    if accelerator and not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for p, prompt in enumerate(validation.prompts):
        rows.append((prompt, generated[p * validation.num_images :][: validation.num_images]))
        for i, picture in enumerate(rows[-1][1]):
            picture.save(folder / f"{p:02d}-{i}.png")
    write_grid(rows, folder / "grid.png")
