"""The config of DreamBooth: its presets, and what to try when memory is short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from trainers.config import dreambooth_rules as rules
from trainers.config.base import Config, field
from trainers.config.dreambooth_sections import (
    DataConfig,
    DreamBoothTrainConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptsConfig,
)
from trainers.config.family_facts import FamilyFacts, families_with, family_facts

MEMORY_PRESETS = {  # preset: what it sets where the config says nothing
    "fast": {},
    "balanced": {
        "model": {"modulation_cache": True},
        "train": {"gradient_checkpointing": "selective"},
    },
    "low": {"model": {"modulation_cache": True}, "train": {"gradient_checkpointing": True}},
    "lowest": {"model": {"quantization": "nf4"}, "train": {"gradient_checkpointing": True}},
}


class DreamBoothConfig(Config):
    kind: Literal["dreambooth"] = field("dreambooth", "Which trainer runs.")
    output_dir: Path = field(
        Path("runs/dreambooth"), "The run folder: everything that the run writes."
    )
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = field(LoraConfig(), "LoRA settings; null trains all weights.")
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: DreamBoothTrainConfig = DreamBoothTrainConfig()
    validation: PromptsConfig = PromptsConfig()

    @model_validator(mode="before")
    @classmethod
    def apply_preset(cls, tree: Any) -> Any:
        """What `train.memory` stands for, written out; what a run cannot have is left out."""
        if not isinstance(tree, dict):
            return tree
        parts = {name: tree.get(name) or {} for name in ("model", "train")}
        if not all(isinstance(part, dict) for part in parts.values()):
            return tree
        preset = MEMORY_PRESETS.get(str(parts["train"].get("memory")), {})
        is_frozen = tree.get("lora", {}) is not None
        family = parts["model"].get("family", ModelConfig().family)
        can_cache_modulation = (
            is_frozen
            and family in families_with("model", "modulation_cache")
            and not parts["train"].get("train_text_encoder")
        )
        possible = {"modulation_cache": can_cache_modulation, "quantization": is_frozen}
        for section, values in preset.items():
            suitable = {key: value for key, value in values.items() if possible.get(key, True)}
            parts[section] = suitable | parts[section]
        return tree | parts if preset else tree

    @property
    def applied_presets(self) -> dict[str, dict[str, Any]]:
        keys = {"model": ["modulation_cache", "quantization"], "train": ["gradient_checkpointing"]}
        values = {
            f"{part}.{key}": getattr(getattr(self, part), key)
            for part, names in keys.items()
            for key in names
        }
        return {f"train.memory={self.train.memory}": values} if self.train.memory else {}

    @property
    def facts(self) -> FamilyFacts:
        return family_facts(self.model.family)

    @property
    def writes_kohya(self) -> bool:
        """Whether a kohya file is written."""
        if self.lora is None:
            return False
        if self.lora.kohya is not None:
            return self.lora.kohya
        return self.facts.kohya.by_default and not self.lora.use_dora

    def memory_suggestions(self) -> Iterator[str]:
        if not self.data.cache:
            yield "data.cache=true: the encoders are freed before training, faster too"
        yield from super().memory_suggestions()
        if not self.train.gradient_checkpointing:
            yield "train.gradient_checkpointing=selective: the same result, about 20 % slower"
        if self.train.gradient_checkpointing is not True:
            yield "train.gradient_checkpointing=true: the same result, about 40 % slower"
        if self.optimizer.name in ("adamw", "prodigy") and (
            self.lora is None or self.train.train_text_encoder
        ):
            yield "optimizer.name=adamw_8bit: a quarter of the optimiser's memory, slightly rounded"
        is_unquantized = self.lora and self.model.quantization == "none"
        if (
            is_unquantized
            and self.model.family in families_with("model", "modulation_cache")
            and not (self.model.modulation_cache or self.train.train_text_encoder)
        ):
            yield "model.modulation_cache=true: a third of the base's memory less, the same result"
        if is_unquantized:
            yield (
                "--config_file accelerate_configs/fsdp2.yaml: the base is cut among several "
                "GPUs, the same result"
            )
            yield "model.quantization=nf4: a quarter of the base's memory, rounded"
        if self.train.train_text_encoder:
            yield "train.train_text_encoder=false: the text encoders are freed"
        if self.data.resolution > 64:
            yield f"data.resolution={self.data.resolution * 3 // 4 // 16 * 16}: less detail"

    def required_packages(self) -> Iterator[tuple[str, str, str]]:
        yield from super().required_packages()
        if self.model.quantization in ("nf4", "int8"):
            yield "model.quantization", self.model.quantization, "bitsandbytes"

    def errors(self) -> Iterator[tuple[str, str]]:
        yield from super().errors()
        yield from rules.picture_errors(self.data)
        yield from rules.family_errors(self)
        yield from rules.memory_errors(self.model, self.lora, self.train)
        yield from rules.speed_errors(self.model, self.lora, self.train)
        yield from rules.training_errors(self.objective, self.optimizer, self.train)
        if self.lora:
            yield from rules.lora_errors(self.lora, self.train)
