"""Rules of the section `lora`, as (path, message) of each that is broken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainers.config.base_rules import Errors
from trainers.config.dreambooth_rules import HUB_PAGE, OTHER_FILES, SINGLE_FILE, is_kind
from trainers.config.dreambooth_sections import DreamBoothTrainConfig
from trainers.config.family_facts import FamilyFacts, family_facts
from trainers.config.layer_patterns import pattern_problem
from trainers.config.lora_section import LoraConfig

LORA_PRESETS = ("attention", "attention+mlp", "all-linear")


def lora_errors(lora: LoraConfig, train: DreamBoothTrainConfig, family: str) -> Errors:
    if lora.use_dora and lora.kohya:
        message = (
            "cannot be combined with lora.use_dora, because kohya's format stores plain LoRA only: "
            "remove one of them"
        )
        yield "lora.kohya", message
    if lora.use_dora and train.train_text_encoder:
        message = (
            "cannot be combined with train.train_text_encoder, because no program loads DoRA into "
            "a text encoder: remove one of them"
        )
        yield "lora.use_dora", message
    facts = family_facts(family)
    is_preset = lora.target_modules in LORA_PRESETS
    if isinstance(lora.target_modules, str) and not is_preset:
        problem = pattern_problem(lora.target_modules, facts)
        if problem:
            yield "lora.target_modules", problem
    yield from pattern_errors("lora.rank_pattern", lora.rank_pattern, facts)
    yield from pattern_errors("lora.alpha_pattern", lora.alpha_pattern, facts)


def pattern_errors(key: str, patterns: Mapping[str, float], facts: FamilyFacts) -> Errors:
    """Patterns that are no regex, or take too long; which layers they name is seen later."""
    for pattern in patterns:
        problem = "a pattern is empty" if not pattern else pattern_problem(pattern, facts)
        if problem:
            yield key, problem


def initial_lora_errors(source: str | None, output_dir: Path) -> Errors:
    """A LoRA to start from that cannot be one, as far as can be seen without reading it."""
    if source is None:
        return
    path = Path(source.rpartition("@")[0] or source)
    if not source.strip():
        message = "must not be empty: write a file, RUN, RUN@STEP or USER/NAME on the Hub, or null"
        yield "lora.init_from", message
    elif "://" in source:
        page = HUB_PAGE.match(source)
        name = page[1] if page else "USER/NAME of a repository on the Hub, or a file"
        yield "lora.init_from", f"{source} is an address: write {name}"
    elif is_kind(path, lambda folder: folder.resolve() == output_dir.resolve()):
        message = (
            f"{source} is this run's own folder. To train it longer, remove the key and raise "
            "train.max_train_steps; for a new run that starts from it, set another output_dir"
        )
        yield "lora.init_from", message
    elif is_path_like(source) and not any(is_kind(p, Path.exists) for p in (Path(source), path)):
        yield "lora.init_from", f"no such file or folder: {source}"


def is_path_like(name: str) -> bool:
    """Whether a name can be none on the Hub."""
    has_ending = name.lower().endswith((SINGLE_FILE, *OTHER_FILES))
    return has_ending or name[0] in "./~" or name.count("/") != 1 or "\\" in name
