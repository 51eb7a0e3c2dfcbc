"""Pictures of the class by the base model itself, for prior preservation (Ruiz et al. 2023, 3.3)."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from .cache import CachedEncoder
from .data import image_files
from .sections import DreamBoothConfig


def make_class_images(encoder: CachedEncoder, config: DreamBoothConfig, folder: Path, accelerator: Accelerator) -> None:
    """Generate the class pictures that the folder lacks, shared among the processes; picture i has noise i."""
    family, data, rank, world = encoder.family, config.data, accelerator.process_index, accelerator.num_processes
    lacking = data.num_class_images - len(image_files(folder))
    names = (folder / f"class-{i:05d}.png" for i in range(data.num_class_images))
    wanted = [path for path in names if not path.exists()][: max(0, lacking)]
    if wanted and data.cache:
        encoder.fill([], [*data.class_prompts, config.validation.negative_prompt], accelerator)
    accelerator.wait_for_everyone()
    if mine := wanted[rank::world]:
        folder.mkdir(parents=True, exist_ok=True)
        family.load("vae", family.denoiser_name, *encoder.live)
        family.compress()
        for path in tqdm(mine, "class pictures", disable=not accelerator.is_main_process):
            number = int(path.stem.removeprefix("class-"))
            prompt = data.class_prompts[number % len(data.class_prompts)]
            picture = family.sample(prompt, config.validation, number, data.resolution, encoder.outputs)
            path.with_suffix(".txt").write_text(prompt, "utf-8")
            aside = path.with_name(f".{path.name}")
            picture.save(aside, format="png")
            aside.replace(path)
        family.release()
    accelerator.wait_for_everyone()
