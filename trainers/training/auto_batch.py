"""The largest micro-batch that fits in memory."""

from __future__ import annotations

import torch
from accelerate.utils.memory import clear_device_cache

from trainers.config import Config
from trainers.distributed.collectives import ProcessGroup
from trainers.training.failures import is_out_of_memory
from trainers.training.loop import Batches, Task, train


def find_executable_batch_size(
    task: Task, batches: Batches, settings: Config, processes: ProcessGroup, start: int
) -> None:
    """Make the micro-batches smaller until a step and Adam's two moments fit in each process;
    nothing is trained."""
    accelerator, one_step = (
        processes.accelerator,
        settings.train.model_copy(update={"max_train_steps": start + 1}),
    )
    accelerator.gradient_accumulation_steps = 2**30  # so that no step is due
    while True:
        moments, has_failed = [], False
        try:
            for player in task.players.values():
                moments += [
                    torch.empty(2, *p.shape, device=p.device)
                    for p in player.module.parameters()
                    if p.requires_grad
                ]
            train(
                task, batches, one_step, settings.seed, accelerator, lambda step: 0.0, start=start
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            has_failed = True
            if batches.batch_slice.batch_size == 1:
                raise
        del moments
        for player in task.players.values():
            player.module.zero_grad()
        clear_device_cache(garbage_collection=True)
        if not processes.all_max(has_failed)[0]:
            break
        batches.batch_slice = batches.batch_slice.split_micro_batches()
    accelerator.gradient_accumulation_steps, accelerator.step = (
        batches.batch_slice.accumulation_steps,
        0,
    )
    batch_slice = batches.batch_slice
    accelerator.print(
        f"micro-batches of {batch_slice.batch_size}, {batch_slice.accumulation_steps} for each step"
    )
