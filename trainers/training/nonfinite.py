"""Steps whose gradient is not finite.

The loop skips each; here they are counted, explained and, if there are many in a row, undone. In
float16 an overflow is none of them, unless it goes on when the loss is not scaled up any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainers.config import Config
from trainers.data.rng import SampleRng
from trainers.training.loop import Batches, StepMetrics, Task, evaluation_mode

MAX_FINDINGS = 3  # findings in a message


class DivergenceError(Exception):
    """So many steps in a row had no finite gradient; `first_step` is the first of them."""

    def __init__(self, first_step: int, message: str) -> None:
        super().__init__(message)
        self.first_step = first_step


class NonfiniteGuard:
    """Reads from the device which steps were skipped, whenever the log is due.

    Raises: DivergenceError after too many in a row.
    """

    def __init__(
        self, task: Task, batches: Batches, config: Config, accelerator: Accelerator
    ) -> None:
        self.task, self.batches, self.config, self.accelerator = task, batches, config, accelerator
        self.pending: list[Tensor] = []
        self.overflowed: list[Tensor] = []  # whether a step was, in float16; else as `pending`
        self.num_skipped = self.num_consecutive = 0  # skipped so far, and without one between

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        self.pending.append(metrics["skipped"])
        self.overflowed.append(metrics.get("overflowed", metrics["skipped"]))
        if step % self.config.tracking.log_every and step != self.config.train.max_train_steps:
            return
        scaler = self.accelerator.scaler
        # the scale goes down at each overflow: one that is so small is not what overflows
        found = self.overflowed if scaler and scaler.get_scale() < 1 else self.pending
        skipped = self.accelerator.reduce(torch.stack(found), "max").tolist()
        last = 0
        for number, is_skipped in enumerate(skipped, step + 1 - len(skipped)):
            if is_skipped:
                self.num_skipped += 1
                self.num_consecutive += 1
                last = number
            else:
                self.num_consecutive = 0
        self.pending, self.overflowed = [], []
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
            f"step {last} was skipped, because its gradient is not finite ({self.num_skipped} "
            f"skipped so far): {findings}",
            stacklevel=2,
        )

    def find_nonfinite(self, step: int) -> list[str]:
        """What is not finite when this process's part of a step (from 0) is computed again.

        For each micro-batch it is the first such value in the order of computation.
        """
        messages = []
        names = self.batches.sample_names(step)
        for (batch, rng), samples in zip(self.batches(step), names, strict=True):
            for name, value in self.compute_values(batch, rng):
                if is_finite(value).all():
                    continue
                message = f"{name} is not finite"
                if not name.startswith("weight "):
                    message += f", of {join(nonfinite_samples(value, samples))}"
                messages.append(message)
                break
        if not messages:
            return [f"only the gradient is not, of {join(chain(*names))}"]
        return messages[:MAX_FINDINGS]

    def compute_values(self, batch: dict, rng: SampleRng) -> list[tuple[str, Tensor]]:
        """A micro-batch's inputs, the weights, every layer's output and the losses, by name."""
        values = list(named_tensors(batch))
        modules = [player.module for player in self.task.players.values()]
        for module in modules:
            values += [(f"weight {name}", p) for name, p in module.named_parameters()]
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(self.accelerator.no_sync(module))
                stack.enter_context(evaluation_mode(module))
                for name, layer in module.named_modules():
                    hook = partial(self.record, values, f"the output of {name}")
                    stack.callback(layer.register_forward_hook(hook).remove)
            values += [(f"loss of {name}", loss) for name, loss in self.task.losses(batch, rng)]
        return values

    @staticmethod
    def record(values: list, name: str, layer: nn.Module, inputs: object, output: object) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        values += [(name, tensor.detach()) for tensor in tensors]


def named_tensors(batch: dict) -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        if isinstance(value, dict):
            yield from named_tensors(value)
        elif isinstance(value, Tensor):
            yield name, value


def is_finite(value: Tensor) -> Tensor:
    """Where a tensor is finite; torch has no such kernel for 8-bit floats."""
    is_float8 = value.dtype.is_floating_point and value.dtype.itemsize == 1
    return (value.float() if is_float8 else value).isfinite()


def join(names: Iterable[str]) -> str:
    """The names, each once."""
    return ", ".join(dict.fromkeys(names))


def nonfinite_samples(value: Tensor, samples: list[str]) -> list[str]:
    """The samples whose rows are not finite; all, where the rows are no samples."""
    if value.dim() < 2 or len(value) != len(samples):
        return samples
    return [name for name, row in zip(samples, value, strict=True) if not is_finite(row).all()]
