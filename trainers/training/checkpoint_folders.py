"""The folders of checkpoints: which are removed, what stays of them, and which are set aside."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator

from trainers.config.base_sections import CheckpointConfig
from trainers.run_folder import (
    LORA_NAMES,
    MANIFEST_NAME,
    WEIGHT_NAME,
    has_lora_alone,
    lora_folders,
    step_folders,
)
from trainers.training.manifest import complete_checkpoints

GONE = ".gone-"
# what is being written, or removed
ASIDE = re.compile(rf"\.(?:{GONE[1:]})?step-[0-9]{{6,}}")


def clear_aside(root: Path) -> None:
    """Remove what an earlier, killed run left aside, and finish what it was removing."""
    for path in root.iterdir():
        if not (ASIDE.fullmatch(path.name) and path.is_dir()):
            continue
        if path.name.startswith(GONE):
            empty_trash(path, keep_lora=True)
        else:
            shutil.rmtree(path)


def prune_checkpoints(root: Path, settings: CheckpointConfig) -> None:
    """Remove the states beyond `checkpoints_total_limit`, and the LoRAs beyond `keep_loras`."""
    newest_first = list(reversed(lora_folders(root).values()))
    excess = [] if settings.keep_loras is None else newest_first[settings.keep_loras :]
    for old in complete_checkpoints(root)[settings.checkpoints_total_limit :]:
        delete_checkpoint(old, keep_lora=old not in excess)
    for old in excess:
        if has_lora_alone(old) and not old.is_symlink():
            delete_loras(old)


def delete_checkpoint(folder: Path, keep_lora: bool = False) -> None:
    """Under another name first, so that a kill leaves no half of it under its own."""
    trash = folder.with_name(GONE + folder.name)
    folder.rename(trash)
    empty_trash(trash, keep_lora)


def empty_trash(trash: Path, keep_lora: bool) -> None:
    """Remove a checkpoint that was renamed; its LoRA, if it is to be kept, gets the name back."""
    folder = trash.with_name(trash.name.removeprefix(GONE))
    if not keep_lora or folder.exists() or not (trash / WEIGHT_NAME).is_file():
        shutil.rmtree(trash)
        return
    for path in trash.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in LORA_NAMES:
            path.unlink()
    trash.rename(folder)


def delete_loras(folder: Path) -> None:
    """Remove the LoRA files in a folder, and the folder if nothing else is in it."""
    for name in LORA_NAMES:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def rename_checkpoints(root: Path, first_step: int, name: str, accelerator: Accelerator) -> None:
    """Rename checkpoints from step `first_step` on to NAME-NNNNNN, once all processes have done
    with them."""
    accelerator.wait_for_everyone()
    for step, folder in step_folders(root).items() if accelerator.is_main_process else ():
        if step >= first_step:
            folder.rename(free_name(root / f"{name}-{step:06d}"))
    accelerator.wait_for_everyone()


def free_name(path: Path) -> Path:
    """`path`, from which an earlier checkpoint is removed, or PATH-2, ... where something else lies
    there."""
    candidate, number = path, 1
    while candidate.exists():
        if (candidate / MANIFEST_NAME).is_file() and not candidate.is_symlink():
            shutil.rmtree(candidate)
        else:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def flush_loras(folder: Path) -> None:
    """Wait until the LoRA files in a folder are on the disk."""
    for name in LORA_NAMES:
        if (folder / name).is_file():
            with open(folder / name, "rb+") as file:
                os.fsync(file.fileno())
