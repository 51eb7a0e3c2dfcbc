"""Pictures by a family's pipeline: of validation prompts, and of the class for its prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from trainers.config import DreamBoothConfig, PromptsConfig
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.imaging import write_grid
from trainers.data.pictures import list_image_files
from trainers.distributed.collectives import own_items, run_across_processes
from trainers.families import Family

PromptEncoder = Callable[[str, str], dict[str, Tensor]]  # a text encoder's name, and a prompt


@torch.no_grad()
def sample_picture(  # noqa: PLR0913 (all that a picture depends on)
    family: Family,
    prompt: str,
    validation: PromptsConfig,
    seed: int,
    size: int,
    encode: PromptEncoder | None = None,
) -> Image:
    """One picture with sides of `size` pixels, by the pipeline that the family holds.

    encode: is called instead of the loaded text encoders.
    """
    encode = encode or family.encode_prompt
    arguments = encode_for_pipeline(family, prompt, encode)
    for name, value in encode_for_pipeline(family, validation.negative_prompt, encode).items():
        arguments[f"negative_{name}"] = value
    vae, is_half = family.pipe.vae, family.dtype != torch.float32
    # the pipeline hands the autoencoder latents in half precision
    if is_half:
        vae.to(family.dtype)
    with torch.autocast(family.device.type, family.dtype, enabled=is_half):
        picture = family.pipe(
            **arguments,
            height=size,
            width=size,
            num_inference_steps=validation.num_inference_steps,
            guidance_scale=validation.guidance_scale,
            # on the CPU, so that every device starts from the same noise
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
    if is_half:
        vae.float()
    return picture


def encode_for_pipeline(family: Family, prompt: str, encode: PromptEncoder) -> dict[str, Tensor]:
    """The keyword arguments (1, ...) by which the pipeline takes an encoded prompt."""
    text = {}
    for name in family.text_encoder_names:
        for key, value in encode(name, prompt).items():
            text[key] = value[None].to(family.device)
    return family.pipeline_arguments(family.condition(text))


def generate_class_images(
    encoder: CachedEncoder, config: DreamBoothConfig, folder: Path, accelerator: Accelerator
) -> None:
    """Generate the class pictures that the folder lacks, shared among the processes.

    Picture i has its own noise and prompt, whoever generates it.
    """
    data = config.data
    num_missing = max(0, data.num_class_images - len(list_image_files(folder)))
    paths = [folder / f"class-{i:05d}.png" for i in range(data.num_class_images)]
    pending = [path for path in paths if not path.exists()][:num_missing]
    if pending and data.cache:
        encoder.fill([], [*data.class_prompts, config.validation.negative_prompt], accelerator)
    accelerator.wait_for_everyone()
    # first each process's own share, then what it does not see, where disks are not shared
    for assigned in (own_items(pending, accelerator), pending):
        missing = [path for path in assigned if not path.exists()]
        if missing:
            generate_missing(encoder, config, missing, accelerator)
        accelerator.wait_for_everyone()


def generate_missing(
    encoder: CachedEncoder,
    config: DreamBoothConfig,
    missing: Sequence[Path],
    accelerator: Accelerator,
) -> None:
    """Load the pipeline, write class pictures with their prompts beside them, and unload it."""
    family, data = encoder.family, config.data
    missing[0].parent.mkdir(parents=True, exist_ok=True)
    family.load("vae", family.denoiser_name, *encoder.loaded_encoders)
    family.apply_memory_options()
    for path in tqdm(missing, "class pictures", disable=not accelerator.is_main_process):
        number = int(path.stem.removeprefix("class-"))
        prompt = data.class_prompts[number % len(data.class_prompts)]
        settings = config.validation, number, data.resolution, encoder.encoder_outputs
        picture = sample_picture(family, prompt, *settings)
        path.with_suffix(".txt").write_text(prompt, "utf-8")
        # under its name a picture is whole, whenever the run is stopped
        temporary = path.with_name(f".{accelerator.process_index}-{path.name}")
        picture.save(temporary, format="png")
        temporary.replace(path)
    family.unload()


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
    validation, size = config.validation, config.data.resolution
    jobs = []
    for prompt in validation.prompts:
        for i in range(validation.num_images):
            settings = validation, validation.seed + i, size, encode
            jobs.append(partial(sample_picture, family, prompt, *settings))
    generated = run_across_processes(jobs, accelerator) if accelerator else [job() for job in jobs]
    if accelerator and not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(validation.prompts):
        first = number * validation.num_images
        row = generated[first : first + validation.num_images]
        rows.append((prompt, row))
        for i, picture in enumerate(row):
            picture.save(folder / f"{number:02d}-{i}.png")
    write_grid(rows, folder / "grid.png")
