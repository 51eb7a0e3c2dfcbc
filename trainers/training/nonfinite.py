"""Steps whose gradient is not finite. The loop skips each; here they are counted, explained and, if
many, undone."""

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
from trainers.training.loop import Batches, StepMetrics, Task

MAX_FINDINGS = 3  # findings in a message


class DivergenceError(Exception):
    """So many steps in a row had no finite gradient; `first_step` is the first of them."""

    def __init__(self, first_step: int, message: str) -> None:
        super().__init__(message)
        self.first_step = first_step


class NonfiniteGuard:
    """Reads the count from the device when the log is due. Raises: DivergenceError after too many
    in a row."""

    def __init__(
        self, task: Task, batches: Batches, config: Config, accelerator: Accelerator
    ) -> None:
        self.task, self.batches, self.config, self.accelerator = task, batches, config, accelerator
        self.pending: list[Tensor] = []
        self.num_skipped = self.num_consecutive = 0  # skipped so far, and without one between

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        self.pending.append(metrics["skipped"])
        if step % self.config.tracking.log_every and step != self.config.train.max_train_steps:
            return
        skipped, last = self.accelerator.reduce(torch.stack(self.pending), "max").tolist(), 0
        for number, is_skipped in enumerate(skipped, step + 1 - len(skipped)):
            self.num_skipped, self.num_consecutive, last = (
                (self.num_skipped + 1, self.num_consecutive + 1, number)
                if is_skipped
                else (self.num_skipped, 0, last)
            )
        self.pending = []
        if not last:
            return
        findings = "; ".join(self.find_nonfinite(last - 1))
        if self.num_consecutive >= self.config.train.max_skipped_steps:
            raise DivergenceError(
                last - self.num_consecutive + 1,
                f"{self.num_consecutive} steps in a row had no finite gradient, the last of them "
                f"step {last}: {findings}",
            )
        warnings.warn(
            f"step {last} was skipped, for its gradient is not finite ({self.num_skipped} so "
            f"far): {findings}",
            stacklevel=2,
        )

    def find_nonfinite(self, step: int) -> list[str]:
        """What is not finite when this process's part of a step (from 0) is computed again, first
        things first."""
        messages, modules = [], [player.module for player in self.task.players.values()]
        for (batch, rng), samples in zip(
            self.batches(step), self.batches.sample_names(step), strict=True
        ):
            values = [(name, value) for name, value in named_tensors(batch)]
            values += [
                (f"weight {name}", p) for module in modules for name, p in module.named_parameters()
            ]
            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
                    stack.callback(module.train)
                    module.eval()
                    for name, layer in module.named_modules():
                        hook = partial(self.record, values, f"the output of {name}")
                        stack.callback(layer.register_forward_hook(hook).remove)
                values += [(f"loss of {name}", loss) for name, loss in self.task.losses(batch, rng)]
            name, value = next(
                ((name, value) for name, value in values if not is_finite(value).all()), ("", None)
            )
            if name.startswith("weight "):
                messages.append(f"{name} is not finite")
            elif name:
                messages.append(
                    f"{name} is not finite, of "
                    f"{', '.join(dict.fromkeys(nonfinite_samples(value, samples)))}"
                )
        all_samples = [sample for samples in self.batches.sample_names(step) for sample in samples]
        return messages[:MAX_FINDINGS] or [
            f"only the gradient is not, of {', '.join(dict.fromkeys(all_samples))}"
        ]

    @staticmethod
    def record(values: list, name: str, layer: nn.Module, inputs: object, output: object) -> None:
        values += [
            (name, tensor.detach()) for tensor in tree_leaves(output) if isinstance(tensor, Tensor)
        ]


def named_tensors(batch: dict) -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        yield from named_tensors(value) if isinstance(value, dict) else [(name, value)]


def is_finite(value: Tensor) -> Tensor:
    """Where a tensor is finite; torch has no such kernel for 8-bit floats."""
    return (
        value.float() if value.dtype.is_floating_point and value.dtype.itemsize == 1 else value
    ).isfinite()


def nonfinite_samples(value: Tensor, samples: list[str]) -> list[str]:
    """The samples whose rows are not finite; all, where the rows are no samples."""
    if value.dim() < 2 or len(value) != len(samples):
        return samples
    return [name for name, row in zip(samples, value, strict=True) if not is_finite(row).all()]
