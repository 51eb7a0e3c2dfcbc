"""Which settings fit on which card, by the plans of `trainers.memory_plan`.

A plan takes seconds to half a minute, so plans are kept in a file and few are made: options that
keep weights elsewhere or in fewer bits are subtracted, and a larger batch is extrapolated.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from trainers import cpu_memory, memory_plan
from trainers.atomic import cache_home, write_atomic
from trainers.config import DreamBoothConfig
from trainers.families import FAMILIES
from trainers.memory_plan import MemoryPlan

CARDS = (8, 12, 16, 24, 48, 80)  # GiB
BATCHES = (8, 4, 2, 1)
MARGIN = 0.1  # of a card, left free for what a plan does not count
GIB = 2**30
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
# what a plan is subtracted from: nothing is held elsewhere or in fewer bits
PLAIN = {"quantization": "none", "modulation_cache": False, "offload": False}

# The settings that are tried on a card, those that train fastest first.
LEVELS: tuple[Mapping[str, object], ...] = (
    {"train.gradient_checkpointing": False},
    {"train.gradient_checkpointing": "selective"},
    {"train.gradient_checkpointing": True},
    {"train.gradient_checkpointing": True, "model.modulation_cache": True},
    {"train.gradient_checkpointing": True, "model.quantization": "nf4"},
    {"train.gradient_checkpointing": True, "model.offload": True},
)


@dataclass(frozen=True)
class Advice:
    """The settings that fit best, and their peak in bytes."""

    level: Mapping[str, object]
    batch_size: int
    peak: float


# a level, and the config that it makes
Candidate = tuple[Mapping[str, object], DreamBoothConfig]


class PlanCache:
    """Plans by what they depend on, in a JSON file that may be removed at any time."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_home() / "plans.json"
        try:
            self.values = dict(json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            self.values = {}

    def get(self, facts: object, compute: Callable[[], object]) -> object:
        """What `compute` returns, or has returned for the same facts."""
        key = hashlib.sha256(json.dumps([facts, program()], default=str).encode()).hexdigest()
        if key not in self.values:
            self.values[key] = compute()
            self.save()
        return self.values[key]

    def save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(self.values))
        except OSError:
            # a home that cannot be written to only costs time
            return


def program() -> list[str]:
    """What computes a plan: a change of it makes the plans that are kept useless."""
    sources = [inspect.getsource(module) for module in (memory_plan, cpu_memory)]
    return [*sources, *(version(name) for name in LIBRARIES)]


class Planner:
    """Plans of one base model, kept in a cache."""

    def __init__(self, dtype: torch.dtype, has_cpu_memory: bool, cache: PlanCache) -> None:
        self.dtype, self.has_cpu_memory, self.cache = dtype, has_cpu_memory, cache

    def plan(self, config: DreamBoothConfig) -> MemoryPlan:
        """As `plan_memory`."""
        plain = config.model_copy(update={"model": config.model.model_copy(update=PLAIN)})
        phases, flops = self.cache.get(self.facts(plain), lambda: self.play(plain))
        saved = 0
        if plain.model != config.model:
            facts = ["saved", self.model_facts(config), str(self.dtype), self.has_cpu_memory]
            saved = self.cache.get(facts, lambda: self.saved(config))
        without = {name: size - saved * (name != "encode") for name, size in phases.items()}
        return MemoryPlan(without, flops)

    def play(self, config: DreamBoothConfig) -> list:
        plan = memory_plan.plan_memory(config, self.dtype, self.has_cpu_memory)
        return [plan.phases, plan.flops]

    def saved(self, config: DreamBoothConfig) -> int:
        folder = str(memory_plan.download_configs(config.model))
        model = config.model.model_copy(update={"pretrained_model_name_or_path": folder})
        dtype = self.dtype if config.lora else torch.float32
        family = FAMILIES[model.family](model, dtype=dtype)
        return memory_plan.saved_bytes(family, config, self.has_cpu_memory)

    def facts(self, config: DreamBoothConfig) -> list:
        """What a plan depends on."""
        lora = config.lora and config.lora.model_dump(mode="json")
        train, data = config.train, config.data
        batch = [train.train_batch_size, data.uses_prior]
        device = [str(self.dtype), self.has_cpu_memory]
        phases = [data.cache, config.validation.draws_pictures]
        sampled = config.validation.largest_size(data.max_resolution)
        settings = [data.max_resolution, sampled, train.gradient_checkpointing]
        settings += [memory_plan.longest_prompt(config)]
        return [self.model_facts(config), lora, batch, settings, phases, device]

    def model_facts(self, config: DreamBoothConfig) -> list:
        """The settings of the base model, and the content of its configs."""
        folder = memory_plan.download_configs(config.model)
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.json")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        exclude = {"pretrained_model_name_or_path"}
        model = config.model.model_dump(mode="json", exclude=exclude)
        return [digest.hexdigest(), model, bool(config.lora)]


def advise(planner: Planner, configs: Sequence[Candidate]) -> dict[int, Advice | None]:
    """For each card, by its GiB, the first of the levels that fits, with its largest batch.

    configs: each level and the config that it makes, with a batch of one.
    """
    fixed = fixed_bytes(planner, configs[0][1])
    fitting: dict[int, Advice | None] = dict.fromkeys(CARDS)
    plans = []
    for level, config in configs:
        model = config.model.model_copy(update=PLAIN)
        whole = planner.plan(config.model_copy(update={"model": model}))
        plans.append((level, planner.plan(config), whole.phases["train"] - fixed))
    for gib in CARDS:
        budget = gib * GIB * (1 - MARGIN)
        fitting[gib] = next(filter(None, (best_fit(*plan, budget) for plan in plans)), None)
    return fitting


def best_fit(
    level: Mapping[str, object], plan: MemoryPlan, per_picture: int, budget: float
) -> Advice | None:
    """A level with the largest batch whose phases fit; None if a batch of one does not."""
    for size in BATCHES:
        train = plan.phases["train"] + (size - 1) * per_picture
        peak = max(plan.peak_bytes, train)
        if peak <= budget:
            return Advice(level, size, peak)
    return None


def fixed_bytes(planner: Planner, config: DreamBoothConfig) -> int:
    """What training holds whatever the batch: weights, LoRA, the optimizer's state."""
    train = config.train.model_copy(update={"train_batch_size": 2})
    one = planner.plan(config).phases["train"]
    two = planner.plan(config.model_copy(update={"train": train})).phases["train"]
    return 2 * one - two
