"""The largest micro-batch that fits in memory."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from trainers.config import Config
from trainers.distributed.collectives import ProcessGroup
from trainers.out_of_memory import is_out_of_memory
from trainers.training.loop import Batches, Task, train

NEVER = 2**30  # so many micro-batches for a step that none is due


def find_executable_batch_size(
    task: Task, batches: Batches, settings: Config, processes: ProcessGroup, start: int
) -> None:
    """Make the micro-batches smaller until a step and Adam's two moments fit in each process.

    Nothing is trained. Raises: RuntimeError where not even a single row fits.
    """
    accelerator = processes.accelerator
    accelerator.gradient_accumulation_steps = NEVER
    while True:
        fits = try_step(task, batches, settings, accelerator, start)
        for player in task.players.values():
            player.module.zero_grad()
        clear_device_cache(garbage_collection=True)
        has_failed = processes.all_max(not fits)[0]
        if not has_failed:
            break
        batches.split_micro_batches()
    batch_slice = batches.batch_slice
    accelerator.gradient_accumulation_steps = batch_slice.accumulation_steps
    accelerator.step = 0
    accelerator.print(
        f"micro-batches of {batch_slice.batch_size}, {batch_slice.accumulation_steps} for each step"
    )


def try_step(
    task: Task, batches: Batches, settings: Config, accelerator: Accelerator, start: int
) -> bool:
    """Whether the gradients of one step fit in memory beside an optimizer's two moments."""
    start = batches.heaviest_step(start)
    one_step = settings.train.model_copy(update={"max_train_steps": start + 1})
    moments: list[Tensor] = []
    try:
        for player in task.players.values():
            for parameter in player.module.parameters():
                if parameter.requires_grad:
                    moments.append(torch.empty(2, *parameter.shape, device=parameter.device))
        train(task, batches, one_step, settings.seed, accelerator, lambda step: 0.0, start=start)
    except RuntimeError as error:
        if not is_out_of_memory(error) or batches.batch_slice.batch_size == 1:
            raise
        return False
    return True
