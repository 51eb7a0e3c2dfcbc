"""What the trainers of small networks share: players, saving, measuring on held-out pictures, the
card."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn

from trainers.atomic import replacing_folder, write_atomic
from trainers.config import ScratchConfig
from trainers.config.validation_metrics import held_out_count
from trainers.data.intake import Intake
from trainers.data.rng import SampleRng, choose_rows, derive_seed
from trainers.data.sampler import BatchSlice
from trainers.from_scratch.checks import warn_of_data
from trainers.from_scratch.image_sets import ImageBatches, TargetReader, load_images
from trainers.publishing import model_card
from trainers.run_folder import FIGURES_NAME, FINAL, MODEL, SAMPLES
from trainers.training.facts import HELD_OUT, Facts
from trainers.training.loop import Callback, Player, averaged_weights, make_player

GRID_COLUMNS = 10  # pictures in a row of a grid
# figures that are no number
UNDEFINED, INFINITE = "not defined on these pictures", "infinite"


class FromScratchTask(ABC):
    """A task of the loop. `test_images` may be None; its pictures are only measured on, never
    learnt from."""

    saved_player: str  # the player whose network the run is for
    pipeline_tag: str  # the Hub's name of what it does
    read_target: TargetReader | None = None  # how the second picture of a pair is read
    num_mask_channels = 0  # channels at the end that hold classes
    # whether held-out pictures of other classes than data.only_label are measured too
    measures_every_class = False
    needs_all_processes = False
    attention = "auto"

    def __init__(self, config: ScratchConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.train_images, self.test_images = (
            load_images(
                config.data,
                self.device,
                held_out,
                self.read_target,
                every_class=held_out and self.measures_every_class,
            )
            for held_out in (False, True)
        )
        self.intake = Intake(config.data.strict)
        warn_of_data(config, self.train_images, self.test_images, self.intake)
        self.tell_of_data()
        batch_slice = BatchSlice.from_config(config.seed, config.train, accelerator)
        self.num_validated = held_out_count(config, batch_slice.global_batch_size)
        torch.manual_seed(derive_seed(config.seed, "init"))
        self.players: dict[str, Player] = {}
        self.callbacks: list[Callback] = []

    @classmethod
    def build(
        cls, config: ScratchConfig, accelerator: Accelerator
    ) -> tuple[FromScratchTask, ImageBatches, Facts]:
        """The task, its batches and the facts of its pictures."""
        task, batch_slice = (
            cls(config, accelerator),
            BatchSlice.from_config(config.seed, config.train, accelerator),
        )
        return (
            task,
            ImageBatches(task.train_images, config.data, batch_slice, task.num_mask_channels),
            {"pictures": task.describe_pictures(), HELD_OUT: task.describe_measured()},
        )

    def tell_of_data(self) -> None:
        """Write and report what was found. Raises: UserError for warnings when `data.strict`."""
        if self.accelerator.is_main_process:
            self.intake.save(self.config.output_dir)
        self.intake.report(self.accelerator.print)

    def describe_pictures(self) -> Facts:
        """Those that decide the result; held-out ones do where they decide when a run ends."""
        described = {"training": self.train_images.describe()}
        if self.config.train.early_stop and self.test_images is not None:
            described[HELD_OUT] = self.test_images.describe()
        return described

    def describe_measured(self) -> Facts:
        """The held-out pictures that a validation measures, beside what the config says of them."""
        if self.test_images is None:
            return {}
        return {"count": min(self.num_validated, len(self.test_images))}

    def add_player(
        self, name: str, module: nn.Module, lr: float | None = None, use_ema: bool = True
    ) -> None:
        settings = self.config.optimizer
        groups = [
            {
                "params": list(module.parameters()),
                "lr": settings.learning_rate if lr is None else lr,
            }
        ]
        ema_decay = self.config.train.ema_decay if use_ema else None
        has_group_norm = any(isinstance(part, nn.GroupNorm) for part in module.modules())
        if (
            self.device.type != "cpu" or not has_group_norm
        ):  # on a CPU convolutions are faster so, group norm is slower
            module = module.to(memory_format=torch.channels_last)
        self.players[name] = make_player(module, groups, settings, ema_decay, self.accelerator)

    @property
    def model(self) -> ModelMixin:
        return self.accelerator.unwrap_model(self.players[self.saved_player].module)

    @abstractmethod
    def losses(self, batch: dict[str, Tensor], rng: SampleRng) -> Iterator[tuple[str, Tensor]]:
        """batch: pixels (B, C, S, S) uint8, label (B,)."""

    @abstractmethod
    def sample(self, folder: Path) -> None: ...

    @abstractmethod
    def measure(self, rows: Sequence[int]) -> dict[str, float | str]:
        """Figures of the model on these test pictures."""

    def evaluate(self) -> dict[str, float | str]:
        """Figures of the finished model on all test pictures."""
        return self.measure(range(len(self.test_images)))

    def curves(self, figures: dict[str, float | str]) -> dict[str, float | str]:
        """Of the figures of a validation those to follow over the steps, by their names there."""
        return figures

    def validate(self) -> dict[str, float]:
        if self.test_images is None or not self.accelerator.is_main_process:
            return {}
        seed = derive_seed(self.config.seed, "validation")
        rows = choose_rows(seed, len(self.test_images), self.num_validated)
        figures, known = self.curves(self.measure(rows)), self.config.validation_metrics
        named = {f"held_out_{name}": value for name, value in figures.items()}
        return {name: float(value) for name, value in named.items() if name in known}

    @abstractmethod
    def usage_example(self) -> str:
        """A line of Python that uses the `model`."""

    def save(self, folder: Path) -> None:
        with replacing_folder(folder / MODEL) as temporary:
            self.save_into(temporary)

    def save_into(self, folder: Path) -> None:
        """Write the model's own folder."""
        self.model.save_pretrained(folder)

    def finish(self, steps: int) -> None:
        """Save, show, measure, write the card."""
        folder, metrics = self.config.output_dir, {}
        with averaged_weights(self):
            self.save(folder)
            self.sample(folder / SAMPLES / FINAL)
            if self.test_images is not None:
                metrics = name_undefined(self.evaluate())
                write_atomic(folder / FIGURES_NAME, json.dumps(metrics, indent=2) + "\n")
                self.accelerator.print(
                    "  ".join(f"{k} {v}" for k, v in model_card.format_metrics(metrics).items())
                )
        kind = type(self.model).__name__
        usage = [
            f"from trainers.from_scratch.networks import {kind}",
            f'model = {kind}.from_pretrained("PATH_OR_REPO", subfolder="{MODEL}")',
            self.usage_example(),
        ]
        model_card.write_scratch_card(
            self.config, steps, self.pipeline_tag, usage, len(self.train_images), metrics
        )


def name_undefined(metrics: Mapping[str, float | str]) -> dict[str, float | str]:
    """Figures with words for those that are no number, which JSON does not know."""
    named: dict[str, float | str] = {}
    for name, value in metrics.items():
        if isinstance(value, str) or math.isfinite(value):
            named[name] = value
        else:
            named[name] = UNDEFINED if math.isnan(value) else INFINITE
    return named


def describe_input(config: ScratchConfig) -> str:
    return (
        f"(B, {config.data.channels}, {config.data.resolution}, {config.data.resolution}) in "
        f"[-1, 1]"
    )
