"""The state to go on from: trained weights, optimiser, one integer and the config; written whole or not at all.

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
from trainers.distributed.trained_weights import trained_state
from trainers.errors import UserError, tolerated
from trainers.run_folder import checkpoints
from trainers.training.loop import Task

IRRELEVANT = {  # what may change between two parts of a run
    *("output_dir", "checkpoint", "validation", "tracking", "hub", "model.modulation_cache", "model.offload"),
    *("train.gradient_checkpointing", "train.train_batch_size", "train.gradient_accumulation_steps"),
    *("train.auto_micro_batch", "train.max_skipped_steps", "train.on_divergence", "train.memory", "train.compile"),
    *("train.attention", "train.cuda_graphs"),
    # the pictures and captions themselves are compared instead of where they lie
    *("data.instance_data_dir", "data.image_dir", "data.dataset_name", "data.class_data_dir", "data.held_out_dir"),
    *("data.cache", "data.cache_dir", "data.in_memory", "data.skip_corrupt"),
}


def relevant(config: Config, world: int, data: str) -> dict[str, object]:
    """What must be equal for a resumed run to be the same run, by path."""
    facts: dict[str, object] = {"data": data}
    facts["global batch"] = config.train.train_batch_size * config.train.gradient_accumulation_steps * world
    for name, value in config.model_dump(mode="json").items():
        parts = {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        facts |= {path: v for path, v in parts.items() if not IRRELEVANT & {name, path}}
    if config.optimizer.lr_scheduler.startswith("constant"):
        del facts["train.max_train_steps"]  # such a run may be made longer
    return facts


@dataclass
class State:
    """Where a run is, beside its tensors. facts: from `relevant`; rollbacks: each has halved the learning rate."""

    facts: dict[str, object]
    step: int = 0
    rollbacks: int = 0


def save_checkpoint(
    config: Config, step: int, task: Task, accelerator: Accelerator, state: State, prune: bool = True
) -> None:
    """Write checkpoints/step-NNNNNN; prune: remove the oldest beyond the limit. What fails is told, as a full disk."""
    if accelerator.is_main_process or deepspeed.stage(accelerator):
        files = packed(step, task, accelerator, state)
    if accelerator.is_main_process:
        root = config.output_dir / "checkpoints"
        aside, final = root / f".step-{step:06d}", root / f"step-{step:06d}"
        try:
            with tolerated(f"writing {final}"):
                write_aside(aside, files)
                if final.exists():
                    discard(final)
                aside.rename(final)
                for old in checkpoints(root)[config.checkpoint.checkpoints_total_limit :] if prune else ():
                    discard(old)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()


def packed(step: int, task: Task, accelerator: Accelerator, state: State) -> dict[str, bytes]:
    """The files of a checkpoint, as one plain process has them; the manifest has a checksum of each."""
    files = {}
    for name, player in task.players.items():
        module = accelerator.unwrap_model(player.module)
        if deepspeed.stage(accelerator):
            trained, optimizer = deepspeed.gathered(module, player.optimizer)
        else:
            trained, optimizer = trained_state(module), player.optimizer.state_dict()
        tensors = {key: p.detach().cpu().contiguous() for key, p in trained.items()}
        files[f"{name}.safetensors"] = save(tensors)
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        files[f"{name}.optimizer.pt"] = buffer.getvalue()
        if player.ema:
            average = {key: value.cpu().contiguous() for key, value in player.ema.average.items()}
            files[f"{name}.ema.safetensors"] = save(average)
    manifest = {
        "step": step,
        "rollbacks": state.rollbacks,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "facts": state.facts,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    manifest["sha256"] = checksum(manifest)
    return files | {"manifest.json": json.dumps(manifest, indent=2).encode()}


def checksum(manifest: dict) -> str:
    """Of all else that it holds."""
    held = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def write_aside(aside: Path, files: dict[str, bytes]) -> None:
    """What an earlier, killed run left aside is removed first."""
    for leftover in aside.parent.glob(".*"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    for name, content in files.items():
        with open(aside / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def discard(folder: Path) -> None:
    """Under another name first, so that a kill leaves no half of it under its own."""
    gone = folder.with_name(f".gone-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def set_aside(root: Path, first: int, name: str, accelerator: Accelerator) -> None:
    """Rename checkpoints from step `first` on to NAME-NNNNNN, once all processes have done with them."""
    accelerator.wait_for_everyone()
    for folder in checkpoints(root) if accelerator.is_main_process else ():
        number = folder.name.removeprefix("step-")
        if int(number) >= first:
            shutil.rmtree(aside := root / f"{name}-{number}", ignore_errors=True)
            folder.rename(aside)
    accelerator.wait_for_everyone()


def verified(folder: Path) -> tuple[dict, dict[str, bytes]] | None:
    """Manifest and files of a checkpoint, or None when it is incomplete or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["sha256"] != checksum(manifest):
            return None
        files = {name: (folder / name).read_bytes() for name in manifest["files"]}
    except (OSError, ValueError, KeyError):
        return None
    if all(hashlib.sha256(files[name]).hexdigest() == digest for name, digest in manifest["files"].items()):
        return manifest, files
    return None


def resume(config: Config, task: Task, accelerator: Accelerator, facts: dict, before: int | None = None) -> State:
    """Put the state back in place, that of the newest valid checkpoint unless the config names one or wants none.

    before: for a run that diverged; later checkpoints are renamed to diverged-NNNNNN. Raises: UserError when the run
    has changed, when the named folder is no valid checkpoint, or when a new beginning would overwrite an earlier run.
    """
    root, wanted = config.output_dir / "checkpoints", config.checkpoint.resume_from_checkpoint
    if before is not None:
        wanted = "latest"
        set_aside(root, before, "diverged", accelerator)
    found = checkpoints(root)
    if wanted is None:
        if found:
            raise UserError(
                f"{config.output_dir} holds a run already ({found[0].name}): choose another output_dir or resume it"
            )
        return State(facts)
    for folder in found if wanted == "latest" else [Path(wanted)]:
        if state := verified(folder):
            break
        if wanted != "latest":
            raise UserError(f"checkpoint.resume_from_checkpoint: {folder} is no complete checkpoint")
        warnings.warn(f"{folder} is damaged and is passed over", stacklevel=2)
    else:
        if found:
            raise UserError(f"none of the {len(found)} checkpoints in {root} is complete: choose another output_dir")
        return State(facts)
    manifest, files = state
    then, now = manifest["facts"], json.loads(json.dumps(facts))
    changed = [f"  {k}: was {then.get(k)}, is {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)]
    if changed:
        told = [f"{folder} was made by another configuration:", *changed, "Put it back, or choose another output_dir"]
        raise UserError("\n".join(told))
    for name, player in task.players.items():
        module, weights = accelerator.unwrap_model(player.module), load(files[f"{name}.safetensors"])
        # by way of the CPU, for the device on which it was written may not be there
        optimizer = torch.load(io.BytesIO(files[f"{name}.optimizer.pt"]), map_location="cpu", weights_only=True)
        with torch.no_grad():
            if deepspeed.stage(accelerator):
                deepspeed.restore(module, player.optimizer, weights, optimizer)
            else:
                trained = trained_state(module)
                for key, tensor in weights.items():
                    trained[key].copy_(tensor)
                player.optimizer.load_state_dict(optimizer)
            if player.ema:
                for key, tensor in load(files[f"{name}.ema.safetensors"]).items():
                    player.ema.average[key].copy_(tensor)
    if accelerator.scaler and manifest["scaler"]:
        accelerator.scaler.load_state_dict(manifest["scaler"])
    set_aside(root, manifest["step"] + 1, "left", accelerator)  # damaged ones, or those of another way from here
    accelerator.print(f"resumed from {folder}: weights and optimiser at step {manifest['step']}")
    return State(facts, manifest["step"], manifest.get("rollbacks", 0))
