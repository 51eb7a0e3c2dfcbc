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
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load, save

from trainers.config import Config
from trainers.distributed import deepspeed
from trainers.distributed.trained_weights import trainable_state
from trainers.errors import UserError, warn_on_error
from trainers.run_folder import list_checkpoints
from trainers.training.loop import Player, Task

CHANGEABLE_KEYS = {  # what may change between two parts of a run
    *(
        "output_dir",
        "checkpoint",
        "validation",
        "tracking",
        "hub",
        "model.modulation_cache",
        "model.offload",
    ),
    *(
        "train.gradient_checkpointing",
        "train.train_batch_size",
        "train.gradient_accumulation_steps",
    ),
    *(
        "train.auto_micro_batch",
        "train.max_skipped_steps",
        "train.on_divergence",
        "train.memory",
        "train.compile",
    ),
    "train.attention",
    # the pictures and captions themselves are compared instead of where they lie
    *(
        "data.instance_data_dir",
        "data.image_dir",
        "data.dataset_name",
        "data.class_data_dir",
        "data.held_out_dir",
    ),
    *("data.cache", "data.cache_dir", "data.in_memory", "data.skip_corrupt"),
}


def resume_facts(config: Config, num_processes: int, data: str) -> dict[str, object]:
    """What must be equal for a resumed run to be the same run, by path."""
    facts: dict[str, object] = {"data": data}
    facts["global batch"] = (
        config.train.train_batch_size * config.train.gradient_accumulation_steps * num_processes
    )
    for name, value in config.model_dump(mode="json").items():
        parts = (
            {f"{name}.{key}": v for key, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        facts |= {path: v for path, v in parts.items() if not CHANGEABLE_KEYS & {name, path}}
    if config.optimizer.lr_scheduler.startswith("constant"):
        del facts["train.max_train_steps"]  # such a run may be made longer
    return facts


@dataclass
class RunState:
    """Where a run is, beside its tensors.

    facts: from `resume_facts`; rollbacks: each has halved the learning rate; end: why the training
    was over before the last step, if it was.
    """

    facts: dict[str, object]
    step: int = 0
    rollbacks: int = 0
    end: str = ""


def save_checkpoint(
    config: Config, task: Task, accelerator: Accelerator, state: RunState, prune: bool = True
) -> None:
    """Write checkpoints/step-NNNNNN. A failure, as of a full disk, is a warning.

    prune: whether to remove the oldest beyond the limit.
    """
    if accelerator.is_main_process or deepspeed.zero_stage(accelerator):
        files = pack_checkpoint(task, accelerator, state)
    if accelerator.is_main_process:
        root = config.output_dir / "checkpoints"
        final = root / f"step-{state.step:06d}"
        temporary = root / f".{final.name}"
        try:
            with warn_on_error(f"writing {final}"):
                write_temporary(temporary, files)
                if final.exists():
                    delete_checkpoint(final)
                temporary.rename(final)
                for old in (
                    list_checkpoints(root)[config.checkpoint.checkpoints_total_limit :]
                    if prune
                    else ()
                ):
                    delete_checkpoint(old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()


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
        files[f"{name}.optimizer.pt"] = buffer.getvalue()
        if player.ema:
            ema = {key: value.cpu().contiguous() for key, value in player.ema.average.items()}
            files[f"{name}.ema.safetensors"] = save(ema)
    manifest = {
        "step": state.step,
        "rollbacks": state.rollbacks,
        "end": state.end,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "facts": state.facts,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    manifest["sha256"] = manifest_checksum(manifest)
    return files | {"manifest.json": json.dumps(manifest, indent=2).encode()}


def manifest_checksum(manifest: dict) -> str:
    """Of all else that it holds."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_temporary(temporary: Path, files: dict[str, bytes]) -> None:
    """What an earlier, killed run left aside is removed first."""
    for leftover in temporary.parent.glob(".*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for name, content in files.items():
        with open(temporary / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def delete_checkpoint(folder: Path) -> None:
    """Under another name first, so that a kill leaves no half of it under its own."""
    trash = folder.with_name(f".gone-{folder.name}")
    folder.rename(trash)
    shutil.rmtree(trash)


def rename_checkpoints(root: Path, first_step: int, name: str, accelerator: Accelerator) -> None:
    """Rename checkpoints from step `first_step` on to NAME-NNNNNN, once all processes have done
    with them."""
    accelerator.wait_for_everyone()
    for folder in list_checkpoints(root) if accelerator.is_main_process else ():
        number = folder.name.removeprefix("step-")
        if int(number) >= first_step:
            shutil.rmtree(renamed := root / f"{name}-{number}", ignore_errors=True)
            folder.rename(renamed)
    accelerator.wait_for_everyone()


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, bytes]] | None:
    """Manifest and files of a checkpoint, or None when it is incomplete or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["sha256"] != manifest_checksum(manifest):
            return None
        files = {name: (folder / name).read_bytes() for name in manifest["files"]}
    except (OSError, ValueError, KeyError):
        return None
    if all(
        hashlib.sha256(files[name]).hexdigest() == digest
        for name, digest in manifest["files"].items()
    ):
        return manifest, files
    return None


def find_checkpoint(root: Path, requested: str | None) -> tuple[Path, dict, dict] | None:
    """The checkpoint to go on from with its manifest and files, or None to start from step 0.

    requested: "latest", a folder, or None for a new run. Raises: UserError when the folder is no
    valid checkpoint, or when a new run would overwrite an earlier one.
    """
    folders = list_checkpoints(root)
    if requested is None and folders:
        raise UserError(
            f"{root.parent} holds a run already ({folders[0].name}): choose another output_dir or "
            "resume it"
        )
    if requested is None:
        return None
    for folder in folders if requested == "latest" else [Path(requested)]:
        if contents := read_checkpoint(folder):
            return folder, *contents
        if requested != "latest":
            raise UserError(
                f"checkpoint.resume_from_checkpoint: {folder} is no complete checkpoint"
            )
        warnings.warn(f"{folder} is damaged and is passed over", stacklevel=3)
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {root} is complete: choose another "
            "output_dir"
        )
    return None


def check_facts(folder: Path, saved: dict, current: dict) -> None:
    """Raises: UserError naming each fact that decides the result and has changed."""
    changed = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    changes = [f"  {key}: was {saved.get(key)}, is {current.get(key)}" for key in changed]
    if changes:
        head = f"{folder} was made by another configuration:"
        raise UserError("\n".join([head, *changes, "Put it back, or choose another output_dir"]))


@torch.no_grad()
def restore_player(
    name: str, player: Player, files: dict[str, bytes], accelerator: Accelerator
) -> None:
    """Copy weights, optimizer state and average from a checkpoint's files into the player."""
    module = accelerator.unwrap_model(player.module)
    weights = load(files[f"{name}.safetensors"])
    # by way of the CPU, for the device on which it was written may not be there
    optimizer = torch.load(
        io.BytesIO(files[f"{name}.optimizer.pt"]), map_location="cpu", weights_only=True
    )
    if deepspeed.zero_stage(accelerator):
        deepspeed.restore_state(module, player.optimizer, weights, optimizer)
    else:
        trained = trainable_state(module)
        for key, tensor in weights.items():
            trained[key].copy_(tensor)
        player.optimizer.load_state_dict(optimizer)
    if player.ema:
        for key, tensor in load(files[f"{name}.ema.safetensors"]).items():
            player.ema.average[key].copy_(tensor)


def resume(
    config: Config,
    task: Task,
    accelerator: Accelerator,
    facts: dict,
    before_step: int | None = None,
) -> RunState:
    """Put the state of the newest valid checkpoint back, unless the config names one or wants none.

    before_step: for a run that diverged; later checkpoints are renamed to diverged-NNNNNN. Raises:
    UserError when the run has changed, and see `find_checkpoint`.
    """
    root, requested = config.output_dir / "checkpoints", config.checkpoint.resume_from_checkpoint
    if before_step is not None:
        requested = "latest"
        rename_checkpoints(root, before_step, "diverged", accelerator)
    found = find_checkpoint(root, requested)
    if found is None:
        return RunState(facts)
    folder, manifest, files = found
    check_facts(folder, manifest["facts"], json.loads(json.dumps(facts)))
    for name, player in task.players.items():
        restore_player(name, player, files, accelerator)
    if accelerator.scaler and manifest["scaler"]:
        accelerator.scaler.load_state_dict(manifest["scaler"])
    # damaged ones, or those of another way from here
    rename_checkpoints(root, manifest["step"] + 1, "left", accelerator)
    accelerator.print(f"resumed from {folder}: weights and optimizer at step {manifest['step']}")
    return RunState(facts, manifest["step"], manifest.get("rollbacks", 0), manifest.get("end", ""))
