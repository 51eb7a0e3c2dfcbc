"""Pictures by a run's base with its LoRA, and with those of its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.data.crops import Crop
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.imaging import to_pil, write_grid, write_picture
from trainers.distributed.accelerator import preferred_dtype
from trainers.distributed.trained_weights import trainable_state
from trainers.efficiency.apply import open_family
from trainers.families import Family
from trainers.families.sampling import sample_picture
from trainers.families.trainable import TrainableDenoiser, trained_encoders
from trainers.lora.export import save_lora
from trainers.lora.files import load_run_file, read_lora
from trainers.lora.layers import add_lora
from trainers.lora.proof import check_keys
from trainers.progress import track
from trainers.run_folder import (
    CACHE,
    CHECKPOINTS,
    FINAL,
    GRID_NAME,
    WEIGHT_NAME,
    lora_folders,
    step_folders,
    step_name,
)
from trainers.training.checkpoint import read_checkpoint
from trainers.training.run_weights import RunWeights

# rows of pictures, each by its prompt and the seed of its noise
PromptSeeds = dict[str, list[tuple[str, int]]]


class LoraSampler:
    """A run's base with its LoRAs, each loaded from its file by diffusers; the same seed is the
    same noise for all."""

    def __init__(
        self,
        weights: RunWeights,
        prompts: Sequence[str],
        export_folder: Path | None,
    ) -> None:
        """export_folder: a folder for the LoRA files of the checkpoints, if they are wanted too.

        The LoRA of `weights` is `name`, the last in `folders`.
        """
        config, run = weights.config, weights.run
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        device = accelerator.device
        family = open_family(config.model, device, preferred_dtype(device))
        text_encoders = trained_encoders(family, config)
        self.encoder = CachedEncoder(
            family, config.data.cache_dir or run / CACHE, config.data.cache, text_encoders
        )
        if config.data.cache:
            self.encoder.fill(
                [], dict.fromkeys([*prompts, config.validation.negative_prompt]), accelerator
            )
        self.name = FINAL if weights.step is None else step_name(weights.step)
        self.folders = {}
        if export_folder:
            self.folders = export_checkpoints(config, run, family, text_encoders, export_folder)
            self.folders.pop(self.name, None)
        self.folders[self.name] = weights.folder
        family.load("vae", family.denoiser_name, *self.encoder.loaded_encoders)
        for name, folder in self.folders.items():
            # diffusers would load a file that is not finite, or not whole
            read_lora(folder / WEIGHT_NAME, family)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a base may hold several, says PEFT
                load_run_file(family, folder / WEIGHT_NAME, name)
            check_keys(family, (family.denoiser_name, *text_encoders), folder / WEIGHT_NAME)
        family.apply_memory_options()
        self.family, self.config = family, config

    def __call__(
        self, name: str, prompt_seeds: PromptSeeds, folder: Path, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Rows of pictures (N, 3, S, S) in [-1, 1], kept as folder/ROW-I.png; "base" is without a
        LoRA."""
        if name == "base":
            self.family.pipe.disable_lora()
        else:
            self.family.pipe.enable_lora()
            self.family.pipe.set_adapters(name, scale)
        validation, side = self.config.validation, self.config.data.max_resolution
        encode, generated = self.encoder.encoder_outputs, {}
        wanted = dict.fromkeys(chain(*prompt_seeds.values()))
        for prompt, seed in track(wanted, f"pictures: {folder.name}"):
            settings = validation, seed, (side, side), encode
            picture = sample_picture(self.family, prompt, *settings)
            generated[prompt, seed] = Crop.square(side)(picture)
        return save_pictures(
            {
                row: torch.stack([generated[prompt_seed] for prompt_seed in row_seeds])
                for row, row_seeds in prompt_seeds.items()
            },
            folder,
        )


def export_checkpoints(
    config: DreamBoothConfig,
    run: Path,
    family: Family,
    text_encoders: Sequence[str],
    export_folder: Path,
) -> dict[str, Path]:
    """The folder with the LoRA of each step that has one, the oldest first; averaged weights if
    kept.

    Checkpoints of earlier versions have none, and theirs are written to `export_folder`.
    """
    folders = step_folders(run / CHECKPOINTS)
    without = [
        folder for step, folder in folders.items() if step not in lora_folders(folder.parent)
    ]
    exported = export_states(config, without, family, text_encoders, export_folder)
    found = {folder.name: exported.get(folder.name, folder) for folder in folders.values()}
    return {name: folder for name, folder in found.items() if (folder / WEIGHT_NAME).is_file()}


@torch.no_grad()
def export_states(
    config: DreamBoothConfig,
    checkpoints: Sequence[Path],
    family: Family,
    text_encoders: Sequence[str],
    export_folder: Path,
) -> dict[str, Path]:
    """The states of checkpoints as LoRA files, each in a folder of its own."""
    if not checkpoints:
        return {}
    family.load(family.denoiser_name, *text_encoders)
    module = TrainableDenoiser(family, text_encoders)
    add_lora(family, config.lora, text_encoders)
    trained, folders = trainable_state(module), {}
    for checkpoint in checkpoints:
        if (state := read_checkpoint(checkpoint)) is None:
            warnings.warn(f"{checkpoint} is damaged and is passed over", stacklevel=2)
            continue
        for part in ("denoiser.safetensors", "denoiser.ema.safetensors"):
            for name, tensor in load(state[1][part]).items() if part in state[1] else ():
                trained[name].copy_(tensor)
        folders[checkpoint.name] = export_folder / checkpoint.name
        folders[checkpoint.name].mkdir(parents=True)
        save_lora(family, text_encoders, folders[checkpoint.name], config)
    family.unload()
    return folders


def save_pictures(rows: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write rows of pictures as ROW-I.png, and all of them as grid.png; they are returned."""
    images = {row: to_pil(x) for row, x in rows.items()}
    write_grid(list(images.items()), folder / GRID_NAME)
    for row, line in images.items():
        for i, image in enumerate(line):
            write_picture(image, folder / f"{row}-{i:02d}.png")
    return rows
