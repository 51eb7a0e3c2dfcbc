"""The largest micro-batch that fits in memory."""

from __future__ import annotations

import torch
from accelerate.utils.memory import clear_device_cache

from trainers.config import Config
from trainers.distributed.collectives import Crew
from trainers.training.failures import out_of_memory
from trainers.training.loop import Batches, Task, train


def fit_in_memory(task: Task, batches: Batches, settings: Config, crew: Crew, start: int) -> None:
    """Make the micro-batches smaller until a step and Adam's two moments fit in each process; nothing is trained."""
    accelerator, once = crew.accelerator, settings.train.model_copy(update={"max_train_steps": start + 1})
    accelerator.gradient_accumulation_steps = 2**30  # so that no step is due
    while True:
        moments, failed = [], False
        try:
            for player in task.players.values():
                moments += [
                    torch.empty(2, *p.shape, device=p.device) for p in player.module.parameters() if p.requires_grad
                ]
            train(task, batches, once, settings.seed, accelerator, lambda step: 0.0, start=start)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            failed = True
            if batches.share.batch_size == 1:
                raise
        del moments
        for player in task.players.values():
            player.module.zero_grad()
        clear_device_cache(garbage_collection=True)
        if not crew.agree(failed)[0]:
            break
        batches.share = batches.share.in_smaller_parts()
    accelerator.gradient_accumulation_steps, accelerator.step = batches.share.accumulation, 0
    rows = batches.share
    accelerator.print(f"micro-batches of {rows.batch_size}, {rows.accumulation} for each step")
