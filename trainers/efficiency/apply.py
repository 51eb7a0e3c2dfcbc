"""What the config asks for, applied to a loaded denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.distributed import deepspeed
from trainers.efficiency.attention import attend
from trainers.efficiency.compilation import compiled, graphed
from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.dreambooth import DreamBooth


def tune(task: DreamBooth) -> None:
    """Choose how the denoiser's blocks run, by a first batch. Raises: UserError."""
    train, accelerator = task.config.train, task.accelerator
    if train.compile:
        if task.family.shard or deepspeed.stage(accelerator):
            raise UserError("train.compile: cannot be had with FSDP2 or DeepSpeed: drop it")
        compiled(task.family.denoiser)
    if train.attention == "auto" and accelerator.device.type != "cuda" and not train.cuda_graphs:
        return  # on a CPU there is one good kernel, and a clock would make runs differ
    _, inputs = next(task.coming(0))
    task.attention = attend(train.attention, task.players["denoiser"].module, inputs, accelerator)
    task.attention.__enter__()  # for as long as the task is there
    if train.cuda_graphs:
        graphed(task.module, inputs, accelerator)
