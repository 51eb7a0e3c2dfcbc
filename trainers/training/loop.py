"""The one training loop. A task yields losses by player; the loop steps that optimiser and resumes
the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from trainers.training.optimizers import EMA, clip_and_step, make_optimizer


@dataclass
class Player:
    """A module, the optimiser of its trained parameters and, if wanted, their average. LoRA has
    one, a GAN two."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None = None


def make_player(
    module: nn.Module,
    groups: list[dict],
    optimizer: OptimizerConfig,
    ema_decay: float | None,
    accelerator: Accelerator,
) -> Player:
    """groups: the optimiser's parameters, each {"params": [...], "lr": peak rate}."""
    unprepared = module, make_optimizer(optimizer, groups)
    prepared = (
        deepspeed.prepare(accelerator, *unprepared)
        if deepspeed.zero_stage(accelerator)
        else accelerator.prepare(*unprepared)
    )
    ema = (
        EMA(module, ema_decay) if ema_decay else None
    )  # only now are the weights where they will be trained
    return Player(*prepared, ema)


class Task(Protocol):
    players: dict[str, Player]
    callbacks: Sequence[
        Callback
    ]  # the task's own; called before the others, they may add to the means
    # whether every process must take part in `sample` and `finish`, as where a model is cut among
    # them
    needs_all_processes: bool

    attention: str  # the kernel of the attention, see `efficiency.attention`

    def losses(self, batch: Any, rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        """Yield (player, scalar loss); when resumed, that player's optimiser has stepped."""

    def sample(self, folder: Path) -> None:
        """Write pictures of what has been learnt so far."""

    def save(self, folder: Path) -> None:
        """Write what the run is for (LoRA weights, a model), as opposed to the state to resume
        it."""


class Batches(Protocol):
    batch_slice: BatchSlice

    def __call__(self, step: int) -> Iterable[tuple[Any, SampleRng]]:
        """This process's micro-batches of one step, each with its random draws."""

    def sample_names(self, step: int) -> list[list[str]]:
        """Of the samples in each of them."""


StepMetrics = dict[str, Tensor]  # scalars on the device: each player's mean loss and gradient norm


Callback = Callable[
    [int, StepMetrics], None
]  # called after optimiser step n with the means of that step


def train(
    task: Task,
    batches: Batches,
    config: TrainConfig,
    seed: int,
    accelerator: Accelerator,
    rate: Callable[[int], float],
    callbacks: Iterable[Callback] = (),
    start: int = 0,
) -> None:
    """Run steps `start` + 1 .. `config.max_train_steps`. Nothing leaves the device here: observers
    do that."""
    for player in task.players.values():
        player.module.train()
        for group in player.optimizer.param_groups:
            group.setdefault(
                "initial_lr", group["lr"]
            )  # kept with the optimiser: a resumed run decays once
    modules = [player.module for player in task.players.values()]
    for step in range(start, config.max_train_steps):
        metrics: StepMetrics = {"skipped": torch.zeros((), device=accelerator.device)}
        for player in task.players.values():
            for group in player.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(step)
        for micro_batch, (batch, rng) in enumerate(batches(step)):
            manual_seed(
                derive_seed(seed, step, micro_batch, "dropout", accelerator.process_index),
                accelerator.device,
            )
            with accelerator.accumulate(*modules):
                for name, loss in task.losses(batch, rng):
                    player = task.players[name]
                    accelerator.backward(loss)
                    scaled_loss = loss.detach() / accelerator.gradient_accumulation_steps
                    metrics[f"{name}_loss"] = metrics.get(f"{name}_loss", 0) + scaled_loss
                    if accelerator.sync_gradients:
                        mean = metrics[f"{name}_loss"]
                        norm, skipped = clip_and_step(
                            player.optimizer, mean, config.max_grad_norm, accelerator
                        )
                        metrics |= {
                            f"{name}_grad_norm": norm,
                            "skipped": metrics["skipped"].maximum(skipped),
                        }
        for player in task.players.values():
            if player.ema and accelerator.sync_gradients:
                player.ema.update(step)
        for callback in callbacks:
            callback(step + 1, metrics)


class averaged_weights:  # noqa: N801
    """Inside, the players' weights are their running averages."""

    def __init__(self, task: Task) -> None:
        self.emas = [player.ema for player in task.players.values() if player.ema]

    def swap(self, *_: object) -> None:
        for ema in self.emas:
            ema.swap()

    __enter__ = __exit__ = swap
