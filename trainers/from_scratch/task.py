"""What the trainers of small networks share: players, saving, measuring on held-out pictures, the card."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn

from trainers.config import ScratchConfig
from trainers.data.rng import Draws, mix
from trainers.data.sampler import Share
from trainers.from_scratch.image_sets import Batches, Reader, load_images
from trainers.publishing import model_card
from trainers.training.loop import Observer, Player, averaged, make_player

SHOWN = 10  # pictures in a row of a grid


class FromScratch(ABC):
    """A task of the loop. `test` may be None; its pictures are only measured on, never learnt from."""

    saved: str  # the player whose network the run is for
    tag: str  # the Hub's name of what it does
    target: Reader | None = None  # how the second picture of a pair is read
    masks = 0  # channels at the end that hold classes
    joint = False

    def __init__(self, config: ScratchConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.train, self.test = (
            load_images(config.data, self.device, held_out, self.target) for held_out in (False, True)
        )
        torch.manual_seed(mix(config.seed, "init"))
        self.players: dict[str, Player] = {}
        self.observers: list[Observer] = []

    @classmethod
    def build(cls, config: ScratchConfig, accelerator: Accelerator) -> tuple[FromScratch, Batches, str]:
        """The task, its batches and a digest of its data."""
        task, share = cls(config, accelerator), Share.of(config.seed, config.train, accelerator)
        return task, Batches(task.train, config.data, share, task.masks), task.train.digest

    def add(self, name: str, module: nn.Module, lr: float | None = None, average: bool = True) -> None:
        settings = self.config.optimizer
        groups = [{"params": list(module.parameters()), "lr": settings.learning_rate if lr is None else lr}]
        decay = self.config.train.ema_decay if average else None
        grouped = any(isinstance(part, nn.GroupNorm) for part in module.modules())
        if self.device.type != "cpu" or not grouped:  # on a CPU convolutions are faster so, group norm is slower
            module = module.to(memory_format=torch.channels_last)
        self.players[name] = make_player(module, groups, settings, decay, self.accelerator)

    @property
    def model(self) -> ModelMixin:
        return self.accelerator.unwrap_model(self.players[self.saved].module)

    @abstractmethod
    def losses(self, batch: dict[str, Tensor], rng: Draws) -> Iterator[tuple[str, Tensor]]:
        """batch: pixels (B, C, S, S) uint8, label (B,)."""

    @abstractmethod
    def sample(self, folder: Path) -> None: ...

    @abstractmethod
    def measure(self) -> dict[str, float | str]:
        """Figures of the model on the test pictures."""

    @abstractmethod
    def example(self) -> str:
        """A line of Python that uses the `model`."""

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder / "model")

    def finish(self) -> None:
        """Save, show, measure, write the card."""
        folder, figures = self.config.output_dir, {}
        with averaged(self):
            self.save(folder)
            self.sample(folder / "samples" / "final")
            if self.test is not None:
                figures = self.measure()
                (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
                self.accelerator.print("  ".join(f"{k} {v}" for k, v in model_card.shown(figures).items()))
        kind = type(self.model).__name__
        use = [
            f"from trainers.from_scratch.networks import {kind}",
            f'model = {kind}.from_pretrained("PATH_OR_REPO", subfolder="model")',
            self.example(),
        ]
        model_card.write_model_card(self.config, self.tag, use, len(self.train), figures)


def shape(config: ScratchConfig) -> str:
    return f"(B, {config.data.channels}, {config.data.resolution}, {config.data.resolution}) in [-1, 1]"
