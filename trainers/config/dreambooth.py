"""The config of DreamBooth: its presets, and what to try when memory is short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from trainers.config import dreambooth_rules as rules
from trainers.config import lora_rules, photo_rules
from trainers.config.base import Config
from trainers.config.base_rules import Errors
from trainers.config.base_sections import field
from trainers.config.bounds import PathField
from trainers.config.caption_rules import caption_errors, placeholder_errors
from trainers.config.dreambooth_data import DataConfig
from trainers.config.dreambooth_sections import (
    DreamBoothTrainConfig,
    ModelConfig,
    PromptsConfig,
)
from trainers.config.family_facts import FamilyFacts, families_with, family_facts
from trainers.config.lora_section import LoraConfig
from trainers.config.objective import ObjectiveConfig, objective_errors
from trainers.config.trigger import fill_prompts
from trainers.config.validation_metrics import HELD_OUT_LOSSES, LIKENESS, OF_LORA

# What each preset sets where the config says nothing.
MEMORY_PRESETS = {
    "fast": {},
    "balanced": {
        "model": {"modulation_cache": True},
        "train": {"gradient_checkpointing": "selective"},
    },
    "low": {"model": {"modulation_cache": True}, "train": {"gradient_checkpointing": True}},
    "lowest": {"model": {"quantization": "nf4"}, "train": {"gradient_checkpointing": True}},
}


class DreamBoothConfig(Config):
    """DreamBooth: a LoRA, or all weights, of a diffusion model from a few pictures."""

    kind: Literal["dreambooth"] = field("dreambooth", "Which trainer runs.")
    output_dir: PathField = field(
        Path("runs/dreambooth"), "The run folder: everything that the run writes."
    )
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = field(LoraConfig(), "LoRA settings; null trains all weights.")
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: DreamBoothTrainConfig = DreamBoothTrainConfig()
    validation: PromptsConfig = PromptsConfig()

    optional_packages: ClassVar[Mapping[str, Mapping[str, str]]] = {
        **Config.optional_packages,
        "model.quantization": {"nf4": "bitsandbytes", "int8": "bitsandbytes"},
    }

    @model_validator(mode="before")
    @classmethod
    def fill_trigger(cls, tree: Any) -> Any:
        """Write `data.trigger` in place of `{trigger}` and `[trigger]`."""
        return fill_prompts(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="before")
    @classmethod
    def apply_preset(cls, tree: Any) -> Any:
        """Write out what `train.memory` stands for, without what the run cannot have.

        A key that the config sets itself keeps its value, and what cannot be combined with it is
        left out.
        """
        if not isinstance(tree, dict):
            return tree
        parts = {name: tree.get(name) or {} for name in ("model", "train")}
        if not all(isinstance(part, dict) for part in parts.values()):
            return tree
        # the tree is not validated yet: what is wrong in it is found afterwards
        preset = MEMORY_PRESETS.get(str(parts["train"].get("memory")), {})
        model, train = parts["model"], parts["train"]
        lora = tree.get("lora", {})
        is_frozen = lora is not None
        settings = lora if isinstance(lora, dict) else {}
        family = model.get("family", ModelConfig().family)
        obstacles = {
            "modulation_cache": (
                family not in families_with("model", "modulation_cache"),
                train.get("train_text_encoder"),
                model.get("quantization") in ("nf4", "int8"),
            ),
            "quantization": (
                model.get("modulation_cache"),
                model.get("offload"),
                train.get("compile"),
                settings.get("type") in ("lokr", "loha"),
                settings.get("init_lora_weights") in lora_rules.STARTS_FROM_BASE,
            ),
        }
        possible = {key: is_frozen and not any(found) for key, found in obstacles.items()}
        for section, values in preset.items():
            suitable = {key: value for key, value in values.items() if possible.get(key, True)}
            parts[section] = suitable | parts[section]
        return tree | parts if preset else tree

    @property
    def applied_presets(self) -> dict[str, dict[str, Any]]:
        if not self.train.memory:
            return {}
        values = {
            "model.modulation_cache": self.model.modulation_cache,
            "model.quantization": self.model.quantization,
            "train.gradient_checkpointing": self.train.gradient_checkpointing,
        }
        return {f"train.memory={self.train.memory}": values}

    @property
    def facts(self) -> FamilyFacts:
        return family_facts(self.model.family)

    @property
    def writes_lora(self) -> bool:
        return self.lora is not None

    @property
    def result_is_small(self) -> bool:
        return self.writes_lora

    @property
    def validation_metrics(self) -> Mapping[str, str]:
        has_photos = any(photos.held_out_dir for photos in self.data.sets)
        metrics = dict.fromkeys(HELD_OUT_LOSSES, "" if has_photos else "data.held_out_dir")
        drawn = "" if self.validation.likeness_pictures else "validation.likeness_pictures"
        metrics |= dict.fromkeys(LIKENESS, drawn)
        if not drawn and (self.lora is None or not self.data.class_prompts):
            metrics |= dict.fromkeys(OF_LORA, "lora and data.class_prompt")
        return metrics

    @property
    def writes_kohya(self) -> bool:
        """Whether a kohya file is written."""
        # of the other kinds the one file has names for all
        if self.lora is None or self.lora.type != "lora":
            return False
        if self.lora.kohya is not None:
            return self.lora.kohya
        return self.facts.kohya.by_default and not self.lora.use_dora

    def memory_suggestions(self) -> Iterator[str]:
        if not self.data.cache:
            yield "data.cache=true: frees the encoders before training, and trains faster"
        yield from super().memory_suggestions()
        yield from self.activation_suggestions()
        yield from self.weight_suggestions()
        if self.data.max_resolution > 64:
            yield f"data.resolution={self.data.max_resolution * 3 // 4 // 16 * 16}: less detail"

    def activation_suggestions(self) -> Iterator[str]:
        """Settings with which fewer activations are kept for the backward pass."""
        if not self.train.gradient_checkpointing:
            yield "train.gradient_checkpointing=selective: about 20 % slower, with the same result"
        if self.train.gradient_checkpointing is not True:
            yield "train.gradient_checkpointing=true: about 40 % slower, with the same result"

    def weight_suggestions(self) -> Iterator[str]:
        """Settings with which the weights and the optimizer need less memory."""
        trains_text_encoder = self.train.train_text_encoder
        trains_many_weights = self.lora is None or trains_text_encoder
        if self.optimizer.name in ("adamw", "prodigy") and trains_many_weights:
            yield (
                "optimizer.name=adamw_8bit: a quarter of the optimizer's memory, with slight "
                "rounding"
            )
        if self.lora and self.model.quantization == "none":
            can_cache = self.model.family in families_with("model", "modulation_cache")
            if can_cache and not self.model.modulation_cache and not trains_text_encoder:
                yield (
                    "model.modulation_cache=true: a third of the base model's memory less, with "
                    "the same result"
                )
            if self.lora.type == "lora":
                yield (
                    "--config_file accelerate_configs/fsdp2.yaml: shards the base model over "
                    "several GPUs, with the same result"
                )
                if self.lora.init_lora_weights not in lora_rules.STARTS_FROM_BASE:
                    yield (
                        "model.quantization=nf4: a quarter of the base model's memory, with "
                        "rounding"
                    )
        if trains_text_encoder:
            yield "train.train_text_encoder=false: frees the text encoders"

    def notes(self) -> Iterator[str]:
        yield from super().notes()
        yield from photo_rules.unused_numbers(self.data)

    def errors(self) -> Errors:
        yield from super().errors()
        yield from rules.base_errors(self.model)
        yield from photo_rules.picture_errors(self.data)
        yield from rules.prior_errors(self.data, self.lora)
        yield from caption_errors(self.data)
        yield from placeholder_errors(self.data, self.validation)
        yield from rules.family_errors(self)
        yield from rules.sample_errors(self)
        yield from rules.likeness_errors(self)
        yield from rules.memory_errors(self.model, self.lora, self.train)
        yield from rules.speed_errors(self.model, self.lora, self.train)
        yield from rules.training_errors(self.optimizer, self.train)
        yield from lora_rules.lora_plus_errors(self.optimizer.lora_plus_ratio, self.lora)
        yield from objective_errors(self)
        if self.lora:
            yield from lora_rules.lora_errors(self.lora, self.train, self.model.family)
            yield from lora_rules.kind_errors(
                self.lora, self.model.quantization, self.train.compile
            )
            yield from lora_rules.start_errors(self.lora, self.model.quantization)
            yield from lora_rules.initial_lora_errors(self.lora.init_from, self.output_dir)
