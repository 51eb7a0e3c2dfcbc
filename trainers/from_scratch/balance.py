"""Whether a generator and its discriminator keep their balance."""

from __future__ import annotations

import warnings
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor

from trainers.config import GanConfig
from trainers.from_scratch.classifier import classify
from trainers.from_scratch.networks import Classifier
from trainers.training.loop import StepMetrics

# spread of generated pictures, relative to real ones, below which there is a warning
COLLAPSE_THRESHOLD = 0.5
# share of pairs that the discriminator puts in order, above which there is a warning
DOMINANCE_THRESHOLD = 0.995


class BalancedTask(Protocol):
    config: GanConfig
    accelerator: Accelerator
    balance_metrics: StepMetrics  # order, gap and diversity of the last step


def class_balance(generated: Tensor, classifier: Classifier) -> dict[str, float]:
    """How evenly the classes are generated.

    modes: how many are generated at all; least_share, most_share: of the rarest and the commonest,
    1 if all were equally common.
    """
    classes = classifier.config.classes
    shares = classify(classifier, generated).bincount(minlength=classes) * classes / len(generated)
    modes = int((shares > 0.1).sum())
    return {"modes": modes, "least_share": float(shares.min()), "most_share": float(shares.max())}


class FailureWarning(UserWarning):
    """The players have lost their balance."""


class WatchBalance:
    """Puts the players' balance among the metrics, and warns once of each failure."""

    def __init__(self, task: BalancedTask) -> None:
        self.task, self.warned = task, set()
        self.num_steps, self.sums = 0, {}

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        metrics |= self.task.balance_metrics
        for name, value in self.task.balance_metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.num_steps += 1
        if step % self.task.config.tracking.log_every or not self.task.accelerator.is_main_process:
            return
        order, diversity = (
            self.sums[name].item() / self.num_steps for name in ("order", "diversity")
        )
        self.num_steps, self.sums = 0, {}
        if diversity < COLLAPSE_THRESHOLD:
            self.warn(
                "collapse",
                f"mode collapse: made pictures vary {diversity:.2f} times as much as real ones",
            )
        if order > DOMINANCE_THRESHOLD:
            self.warn(
                "won",
                f"the discriminator tells {order:.1%} of the pairs apart: the generator learns "
                f"little",
            )

    def warn(self, name: str, message: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            warnings.warn(message, FailureWarning, stacklevel=2)
