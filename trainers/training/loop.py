"""The one training loop.

A task yields losses by player; the loop steps that player's optimizer and resumes the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainers.config import OptimizerConfig, TrainConfig
from trainers.data.rng import SampleRng, derive_seed, manual_seed
from trainers.data.sampler import BatchSlice
from trainers.distributed import deepspeed
from trainers.training.averages import EMA, ScheduleFreeAverage, make_average
from trainers.training.optimizers import clip_and_step, make_optimizer


@dataclass
class Player:
    """A module, the optimizer of its trained parameters and, if wanted, their running average.

    LoRA, an autoencoder and a U-Net have one player; a GAN has two.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | ScheduleFreeAverage | None = None

    def set_learning_rate(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak, which a checkpoint keeps with it."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def update_average(self, step: int) -> None:
        if self.ema:
            self.ema.update(step)


def make_player(
    module: nn.Module,
    groups: list[dict],
    optimizer: OptimizerConfig,
    ema_decay: float | None,
    accelerator: Accelerator,
) -> Player:
    """Make the optimizer, and prepare it and the module for the processes and the device.

    groups: the trained parameters, each {"params": [...], "lr": peak rate}.
    """
    unprepared = module, make_optimizer(optimizer, groups)
    if deepspeed.zero_stage(accelerator):
        prepared = deepspeed.prepare(accelerator, *unprepared)
    else:
        prepared = accelerator.prepare(*unprepared)
    # only now are the weights where they will be trained
    return Player(*prepared, make_average(module, prepared[1], ema_decay))


StepMetrics = dict[str, Tensor]  # scalars on the device: each player's mean loss and gradient norm


@dataclass(frozen=True)
class StopReason:
    """Why the loop ended.

    step: the last step that was trained. signal_number: the signal that asked for it; 0 if the
    training is over, and what was learned is to be kept as the run's result.
    """

    message: str
    step: int
    signal_number: int = 0


# called after optimizer step n with the means of that step; the loop stops if it returns a reason,
# which every process must do after the same step
Callback = Callable[[int, StepMetrics], StopReason | None]


class Trainable(Protocol):
    """What the loop needs: players, and their losses on a micro-batch."""

    players: dict[str, Player]

    def losses(self, batch: Any, rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        """Yield (player, scalar loss); when resumed, that player's optimizer has stepped."""


class Task(Trainable, Protocol):
    """What `run` needs beyond that: pictures on the way, and a result."""

    # the task's own, which are called before the others and may add to the means
    callbacks: Sequence[Callback]
    # whether all processes must take part in `sample` and `finish`, as where they share a model
    needs_all_processes: bool
    attention: str  # the kernel of the attention, see `efficiency.attention`

    def sample(self, folder: Path) -> None:
        """Write pictures of what has been learned so far."""

    def validate(self) -> dict[str, float]:
        """Measure on a part of the held-out pictures, see `Config.validation_metrics`.

        Every process calls it, and what the main one returns counts.
        """

    def save(self, folder: Path) -> None:
        """Write what the run is for (LoRA weights, a model), not the state to resume it from."""

    def finish(self, steps: int) -> None:
        """Save, sample, measure and describe what was learned in so many steps.

        Nothing is trained afterwards.
        """


class Batches(Protocol):
    """This process's micro-batches, as a function of the step."""

    batch_slice: BatchSlice

    def __call__(self, step: int) -> Iterable[tuple[Any, SampleRng]]:
        """The micro-batches of one step, each with its random draws."""

    def sample_names(self, step: int) -> list[list[str]]:
        """The names of the samples in each micro-batch of a step."""

    def heaviest_step(self, start: int) -> int:
        """The first step from `start` on that needs as much memory as any."""

    def split_micro_batches(self) -> None:
        """From now on take more and smaller micro-batches for each step."""


def train(  # noqa: PLR0913 (all that a step depends on)
    task: Trainable,
    batches: Batches,
    config: TrainConfig,
    seed: int,
    accelerator: Accelerator,
    rate: Callable[[int], float],
    callbacks: Iterable[Callback] = (),
    start: int = 0,
) -> StopReason:
    """Run steps `start` + 1 .. `config.max_train_steps`, or until a callback asks to stop.

    rate: step to factor of the peak learning rate. Nothing leaves the device here; callbacks may
    read from it.
    """
    players = task.players.values()
    modules = [player.module.train() for player in players]
    for step in range(start, config.max_train_steps):
        for player in players:
            player.set_learning_rate(rate(step))
        metrics: StepMetrics = {"skipped": torch.zeros((), device=accelerator.device)}
        for micro_batch, (batch, rng) in enumerate(batches(step)):
            key = seed, step, micro_batch, "dropout", accelerator.process_index
            manual_seed(derive_seed(*key), accelerator.device)
            with accelerator.accumulate(*modules):
                for name, loss in task.losses(batch, rng):
                    back_propagate(name, loss, metrics, accelerator)
                    if accelerator.sync_gradients:
                        step_player(name, task.players[name], metrics, config, accelerator)
        if accelerator.sync_gradients:
            for player in players:
                player.update_average(step)
        # each is called, also after one that asks to stop
        reasons = [callback(step + 1, metrics) for callback in callbacks]
        for reason in filter(None, reasons):
            return reason
    return StopReason("the last step is done", config.max_train_steps)


def back_propagate(name: str, loss: Tensor, metrics: StepMetrics, accelerator: Accelerator) -> None:
    """Add the gradient of a player's loss (a scalar), and the loss to the mean of the step."""
    accelerator.backward(loss)
    share = loss.detach() / accelerator.gradient_accumulation_steps
    metrics[f"{name}_loss"] = metrics.get(f"{name}_loss", 0) + share


def step_player(
    name: str, player: Player, metrics: StepMetrics, config: TrainConfig, accelerator: Accelerator
) -> None:
    """Step a player's optimizer by its gradient, and note its norm and whether it was skipped."""
    mean = metrics[f"{name}_loss"]
    norm, skipped = clip_and_step(player.optimizer, mean, config.max_grad_norm, accelerator)
    metrics[f"{name}_grad_norm"] = norm
    metrics["skipped"] = metrics["skipped"].maximum(skipped)
    if accelerator.scaler:
        overflowed = (~norm.isfinite()).float()
        metrics["overflowed"] = overflowed.maximum(metrics.get("overflowed", overflowed))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A context without dropout; the module trains again afterwards."""
    module.eval()
    try:
        yield
    finally:
        module.train()


class averaged_weights:  # noqa: N801 (it is called like a function)
    """A context in which the players' weights are their running averages."""

    def __init__(self, task: Trainable) -> None:
        self.emas = [player.ema for player in task.players.values() if player.ema]

    def swap(self, *_: object) -> None:
        for ema in self.emas:
            ema.swap()

    __enter__ = __exit__ = swap
