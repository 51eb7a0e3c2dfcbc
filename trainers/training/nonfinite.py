"""Steps whose gradient is not finite. The loop skips each; here they are counted, explained and, if many, undone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainers.config import Config
from trainers.training.loop import Batches, Means, Task

SHOWN = 3  # findings in a message


class DivergenceError(Exception):
    """So many steps in a row had no finite gradient; `first` is the first of them."""

    def __init__(self, first: int, message: str) -> None:
        super().__init__(message)
        self.first = first


class Guard:
    """Reads the count from the device when the log is due. Raises: DivergenceError after too many in a row."""

    def __init__(self, task: Task, batches: Batches, config: Config, accelerator: Accelerator) -> None:
        self.task, self.batches, self.config, self.accelerator = task, batches, config, accelerator
        self.unread: list[Tensor] = []
        self.total = self.row = 0  # skipped so far, and without one between

    def __call__(self, step: int, means: Means) -> None:
        self.unread.append(means["skipped"])
        if step % self.config.tracking.log_every and step != self.config.train.max_train_steps:
            return
        skipped, last = self.accelerator.reduce(torch.stack(self.unread), "max").tolist(), 0
        for number, was in enumerate(skipped, step + 1 - len(skipped)):
            self.total, self.row, last = (self.total + 1, self.row + 1, number) if was else (self.total, 0, last)
        self.unread = []
        if not last:
            return
        found = "; ".join(self.findings(last - 1))
        if self.row >= self.config.train.max_skipped_steps:
            raise DivergenceError(
                last - self.row + 1,
                f"{self.row} steps in a row had no finite gradient, the last of them step {last}: {found}",
            )
        warnings.warn(
            f"step {last} was skipped, for its gradient is not finite ({self.total} so far): {found}", stacklevel=2
        )

    def findings(self, step: int) -> list[str]:
        """What is not finite when this process's part of a step (from 0) is computed again, first things first."""
        found, modules = [], [player.module for player in self.task.players.values()]
        for (batch, rng), samples in zip(self.batches(step), self.batches.names(step), strict=True):
            seen = [(name, value) for name, value in leaves(batch)]
            seen += [(f"weight {name}", p) for module in modules for name, p in module.named_parameters()]
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
                    stack.callback(module.train)
                    module.eval()
                    for name, layer in module.named_modules():
                        note = partial(self.note, seen, f"the output of {name}")
                        stack.callback(layer.register_forward_hook(note).remove)
                seen += [(f"loss of {name}", loss) for name, loss in self.task.losses(batch, rng)]
            name, value = next(((name, value) for name, value in seen if not finite(value).all()), ("", None))
            if name.startswith("weight "):
                found.append(f"{name} is not finite")
            elif name:
                found.append(f"{name} is not finite, of {', '.join(dict.fromkeys(culprits(value, samples)))}")
        every = [sample for samples in self.batches.names(step) for sample in samples]
        return found[:SHOWN] or [f"only the gradient is not, of {', '.join(dict.fromkeys(every))}"]

    @staticmethod
    def note(seen: list, name: str, layer: nn.Module, inputs: object, output: object) -> None:
        seen += [(name, tensor.detach()) for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]


def leaves(batch: dict) -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        yield from leaves(value) if isinstance(value, dict) else [(name, value)]


def finite(value: Tensor) -> Tensor:
    """Where a tensor is finite; torch has no such kernel for 8-bit floats."""
    return (value.float() if value.dtype.is_floating_point and value.dtype.itemsize == 1 else value).isfinite()


def culprits(value: Tensor, samples: list[str]) -> list[str]:
    """The samples whose rows are not finite; all, where the rows are no samples."""
    if value.dim() < 2 or len(value) != len(samples):
        return samples
    return [name for name, row in zip(samples, value, strict=True) if not finite(row).all()]
