"""What the config asks for, applied to a loaded denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.distributed import deepspeed
from trainers.efficiency.attention import choose_attention
from trainers.efficiency.compilation import capture_cuda_graphs, compile_blocks
from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.dreambooth import DreamBooth


def configure_kernels(task: DreamBooth) -> None:
    """Choose how the denoiser's blocks run, by a first batch. Raises: UserError."""
    train, accelerator = task.config.train, task.accelerator
    if train.compile:
        if task.family.shard or deepspeed.zero_stage(accelerator):
            raise UserError("train.compile: cannot be had with FSDP2 or DeepSpeed: drop it")
        compile_blocks(task.family.denoiser)
    if train.attention == "auto" and accelerator.device.type != "cuda" and not train.cuda_graphs:
        return  # on a CPU there is one good kernel, and a clock would make runs differ
    _, inputs = next(task.upcoming_inputs(0))
    task.attention = choose_attention(
        train.attention, task.players["denoiser"].module, inputs, accelerator
    )
    task.attention.__enter__()  # for as long as the task is there
    if train.cuda_graphs:
        capture_cuda_graphs(task.module, inputs, accelerator)
