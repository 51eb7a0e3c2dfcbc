"""The config that every trainer has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainers.config import base_rules as rules
from trainers.config.base_sections import (
    CheckpointConfig,
    HubConfig,
    OptimizerConfig,
    Section,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
    field,
)
from trainers.config.bounds import Name, PathField, Seed
from trainers.config.validation_metrics import validation_errors


class Config(Section):
    """What every trainer has."""

    kind: Name = field("", "Which trainer runs.")
    output_dir: PathField = field(
        Path("runs/run"), "The run folder: everything that the run writes."
    )
    seed: Seed = field(0, "Seed of data order, noise and times.")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()
    hub: HubConfig = HubConfig()

    # section.key: its values that require an optional package, and that package's module
    optional_packages: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "optimizer.name": {
            "adamw_8bit": "bitsandbytes",
            "paged_adamw_8bit": "bitsandbytes",
            "prodigy": "prodigyopt",
            "lion": "lion_pytorch",
            "came": "came_pytorch",
            "schedule_free": "schedulefree",
            "prodigy_schedule_free": "prodigyplus",
        },
        "tracking.report_to": {
            "tensorboard": "tensorboard",
            "wandb": "wandb",
            "trackio": "trackio",
        },
    }

    @property
    def can_accumulate(self) -> bool:
        """Whether a batch may be trained on in parts.

        It may not where one player has to step before the other one sees it.
        """
        return True

    @property
    def writes_lora(self) -> bool:
        """Whether what is trained is a LoRA, whose file lies beside each checkpoint."""
        return False

    @property
    def result_is_small(self) -> bool:
        """Whether the weights that a run is for may be kept twice without asking."""
        return True

    @property
    def validation_metrics(self) -> Mapping[str, str]:
        """What a validation measures with this kind of run, by name in metrics.jsonl.

        The one that a run is judged by comes first. The value is what the config lacks for it,
        empty where it has all.
        """
        return {}

    @property
    def applied_presets(self) -> dict[str, dict[str, Any]]:
        """Presets, and the settings that each of them resulted in."""
        return {}

    def memory_suggestions(self) -> Iterator[str]:
        """Settings that need less memory than these, those with the smallest cost first."""
        size = self.train.train_batch_size
        if size > 1 and self.can_accumulate:
            if not self.train.auto_micro_batch:
                yield (
                    "train.auto_micro_batch=true: splits the batch into micro-batches that fit, "
                    "with the same result"
                )
        elif size > 2:
            yield f"train.train_batch_size={size // 2}: smaller batches"

    def notes(self) -> Iterator[str]:
        """What is allowed and yet has no effect, a sentence each."""
        return iter(())

    def errors(self) -> rules.Errors:
        """Rules that one field's type cannot state, as (path, message)."""
        yield from rules.output_errors(self.output_dir)
        yield from rules.optimizer_errors(self)
        yield from rules.package_errors(self)
        if not self.can_accumulate:
            yield from rules.accumulation_errors(self.train)
        yield from rules.hub_errors(self.hub)
        yield from validation_errors(self)
