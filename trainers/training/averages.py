"""Averages of the weights over a run, which are what it is for where there are any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainers.distributed.trained_weights import trainable_parameters
from trainers.training.optimizers import unwrap


class EMA:
    """A running average of a module's trained parameters, kept beside them.

    The decay grows as min(decay, (1 + step) / (10 + step)), so that short runs are not averaged
    with their start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = trainable_parameters(module)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights; call it again to undo."""
        for name, parameter in self.trained.items():
            weight = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weight)


class ScheduleFreeAverage:
    """The average that a schedule-free optimizer keeps (Defazio et al. 2024).

    The weights are where it takes its gradients; the average is what it is for.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.trained = unwrap(optimizer), trainable_parameters(module)
        self.kept: dict[str, Tensor] = {}
        self.optimizer.train()

    def update(self, step: int) -> None:
        """Do nothing: the optimizer does it."""

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights; call it again to undo, to the bit."""
        if not self.kept:
            self.kept = {name: p.detach().clone() for name, p in self.trained.items()}
            self.optimizer.eval()
            return
        self.optimizer.train()
        for name, parameter in self.trained.items():
            parameter.copy_(self.kept.pop(name))

    @property
    def average(self) -> dict[str, Tensor]:
        """A copy of it, by the names of the trained parameters."""
        self.swap()
        found = {name: p.detach().clone() for name, p in self.trained.items()}
        self.swap()
        return found


def make_average(
    module: nn.Module, optimizer: torch.optim.Optimizer, decay: float | None
) -> EMA | ScheduleFreeAverage | None:
    """The average that was asked for, or the optimizer's own."""
    if decay:
        return EMA(module, decay)
    # as all schedule-free optimizers note whether they are where they take gradients
    is_schedule_free = "train_mode" in unwrap(optimizer).param_groups[0]
    return ScheduleFreeAverage(module, optimizer) if is_schedule_free else None
