"""The state to go on from: trained weights, optimiser, one integer and the config; written whole or
not at all.

Nothing else is needed: data order, noise and learning rate are functions of the step.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import Tensor

from trainers.config import Config
from trainers.distributed import deepspeed
from trainers.distributed.collectives import run_on_main
from trainers.distributed.trained_weights import trainable_state
from trainers.errors import UserError, warn_on_error
from trainers.run_folder import (
    CHECKPOINTS,
    MANIFEST_NAME,
    OPTIMIZER_SUFFIX,
    has_lora_alone,
    list_checkpoints,
    lora_folders,
    parse_step,
    step_name,
)
from trainers.training.best_weights import BestSoFar, add_best, restore_best, result_weights
from trainers.training.checkpoint_folders import (
    clear_aside,
    delete_checkpoint,
    flush_loras,
    prune_checkpoints,
    rename_checkpoints,
)
from trainers.training.facts import Facts, check_facts, check_length
from trainers.training.loop import Player, Task
from trainers.training.manifest import (
    is_own_checkpoint,
    manifest_checksum,
    read_checkpoint,
)
from trainers.training.run_state import RunState, is_over, state_of


def save_checkpoint(
    config: Config, task: Task, accelerator: Accelerator, state: RunState, prune: bool = True
) -> None:
    """Write checkpoints/step-NNNNNN, with the LoRA that a run stopped here would have given.

    A failure, as of a full disk, is a warning. prune: whether to remove the oldest beyond the
    limits.
    """
    if accelerator.is_main_process or deepspeed.zero_stage(accelerator):
        files = pack_checkpoint(task, accelerator, state)
    with result_weights(task, accelerator) if config.writes_lora else nullcontext():
        if accelerator.is_main_process:
            write_checkpoint(config, task, state, files, prune)
    accelerator.wait_for_everyone()


def write_checkpoint(
    config: Config, task: Task, state: RunState, files: dict[str, bytes], prune: bool
) -> None:
    """Write it aside, and give it its name when all of it is on the disk."""
    final = config.output_dir / CHECKPOINTS / step_name(state.step)
    temporary = final.with_name(f".{final.name}")
    try:
        with warn_on_error(f"writing {final}"):
            write_temporary(temporary, files)
            if config.writes_lora:
                task.save(temporary)
                flush_loras(temporary)
            add_best(config.output_dir, state.best, temporary)
            if is_own_checkpoint(final) or has_lora_alone(final):
                delete_checkpoint(final)
            elif final.exists():
                raise FileExistsError(f"{final} is no checkpoint of this run: move it away")
            temporary.rename(final)
            if prune:
                prune_checkpoints(final.parent, config.checkpoint)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pack_checkpoint(task: Task, accelerator: Accelerator, state: RunState) -> dict[str, bytes]:
    """The files of a checkpoint, as one plain process has them; the manifest has a checksum of
    each."""
    files = {}
    for name, player in task.players.items():
        module = accelerator.unwrap_model(player.module)
        if deepspeed.zero_stage(accelerator):
            trained, optimizer = deepspeed.gather_state(module, player.optimizer)
        else:
            trained, optimizer = trainable_state(module), player.optimizer.state_dict()
        tensors = {key: p.detach().cpu().contiguous() for key, p in trained.items()}
        files[f"{name}.safetensors"] = save(tensors)
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        files[f"{name}{OPTIMIZER_SUFFIX}"] = buffer.getvalue()
        if player.ema:
            ema = {key: value.cpu().contiguous() for key, value in player.ema.average.items()}
            files[f"{name}.ema.safetensors"] = save(ema)
    manifest = {
        "step": state.step,
        "rollbacks": state.rollbacks,
        "end": state.end,
        "extensions": list(state.extensions),
        "best": asdict(state.best),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "facts": state.facts,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    manifest["sha256"] = manifest_checksum(manifest)
    return files | {MANIFEST_NAME: json.dumps(manifest, indent=2).encode()}


def write_temporary(temporary: Path, files: dict[str, bytes]) -> None:
    """Write the files of a checkpoint, after what an earlier, killed run left aside is removed."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    clear_aside(temporary.parent)
    temporary.mkdir()
    for name, content in files.items():
        with open(temporary / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def find_checkpoint(root: Path, requested: str | None) -> tuple[Path, dict, dict] | None:
    """The checkpoint to go on from with its manifest and files, or None to start from step 0.

    requested: "latest", a folder, or None for a new run. Raises: UserError when the folder is no
    valid checkpoint, or when a new run would overwrite an earlier one.
    """
    folders = list_checkpoints(root)
    names = [folder.name for folder in (*folders, *lora_folders(root).values())]
    if requested is None and names:
        raise UserError(
            f"{root.parent} holds a run already ({names[0]}): choose another output_dir or "
            "resume it"
        )
    if requested is None:
        return None
    if requested != "latest":
        if contents := read_checkpoint(Path(requested)):
            return Path(requested), *contents
        raise UserError(f"checkpoint.resume_from_checkpoint: {requested} is no complete checkpoint")
    for folder in folders:
        contents = read_checkpoint(folder)
        # a copy of another one, under a later step's name, is none of that step
        if contents and contents[0]["step"] == parse_step(folder.name):
            return folder, *contents
        warnings.warn(f"{folder} is damaged and is passed over", stacklevel=3)
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {root} is complete: choose another "
            "output_dir"
        )
    return None


def check_files(folder: Path, name: str, player: Player, files: dict[str, bytes]) -> None:
    """Raises: UserError unless a checkpoint has all files of the player."""
    wanted = [f"{name}.safetensors", f"{name}.optimizer.pt"]
    if player.ema:
        wanted.append(f"{name}.ema.safetensors")
    if missing := [file for file in wanted if file not in files]:
        raise UserError(
            f"{folder} has no {', '.join(missing)}, so it is of another kind of run: choose "
            "another output_dir"
        )


@torch.no_grad()
def restore_player(
    name: str, player: Player, files: dict[str, bytes], accelerator: Accelerator
) -> None:
    """Copy weights, optimizer state and average from a checkpoint's files into the player."""
    module = accelerator.unwrap_model(player.module)
    weights = load(files[f"{name}.safetensors"])
    # by way of the CPU, for the device on which it was written may not be there
    optimizer = torch.load(
        io.BytesIO(files[f"{name}{OPTIMIZER_SUFFIX}"]), map_location="cpu", weights_only=True
    )
    if deepspeed.zero_stage(accelerator):
        deepspeed.restore_state(module, player.optimizer, weights, optimizer)
    else:
        copy_tensors(trainable_state(module), weights)
        player.optimizer.load_state_dict(optimizer)
    if player.ema:
        copy_tensors(player.ema.average, load(files[f"{name}.ema.safetensors"]))


def copy_tensors(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Raises: UserError unless both have the same names and shapes; nothing is copied then."""
    shapes = [{name: tuple(t.shape) for name, t in group.items()} for group in (targets, sources)]
    if shapes[0] != shapes[1]:
        different = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise UserError(
            f"the checkpoint has other weights than this run trains, for example {different[0]}: "
            "choose another output_dir"
        )
    for name, tensor in sources.items():
        targets[name].copy_(tensor)


def resume(
    config: Config,
    task: Task,
    accelerator: Accelerator,
    facts: Facts,
    before_step: int | None = None,
) -> RunState:
    """Put the state of the newest valid checkpoint back, unless the config names one or wants none.

    before_step: for a run that diverged; later checkpoints are renamed to diverged-NNNNNN. Raises:
    UserError when the run has changed, and see `find_checkpoint`.
    """
    root, requested = config.output_dir / CHECKPOINTS, config.checkpoint.resume_from_checkpoint
    if before_step is not None:
        requested = "latest"
        rename_checkpoints(root, before_step, "diverged", accelerator)
    found = find_checkpoint(root, requested)
    if found is None:
        # the LoRAs of a run whose states were removed by hand are none of this run's
        rename_checkpoints(root, 1, "left", accelerator)
        if accelerator.is_main_process:
            restore_best(config.output_dir, BestSoFar(), None)
        return RunState(facts)
    folder, manifest, files = found

    def check() -> None:
        check_facts(folder, manifest["facts"], facts, config)
        check_length(folder, manifest["step"], config)

    # of the main process alone, for other machines may have drawn class pictures of their own
    run_on_main(accelerator, check)
    for name, player in task.players.items():
        check_files(folder, name, player, files)
        restore_player(name, player, files, accelerator)
    if accelerator.scaler and manifest["scaler"]:
        accelerator.scaler.load_state_dict(manifest["scaler"])
    # damaged ones, or those of another way from here
    rename_checkpoints(root, manifest["step"] + 1, "left", accelerator)
    accelerator.print(f"resumed from {folder}: weights and optimizer at step {manifest['step']}")
    state = state_of(manifest, facts, config, accelerator)
    if accelerator.is_main_process and not is_over(state, config):
        restore_best(config.output_dir, state.best, folder)
    return state
