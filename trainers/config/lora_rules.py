"""Rules of the section `lora`, as (path, message) of each that is broken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainers.config.base_rules import Errors
from trainers.config.dreambooth_rules import HUB_PAGE, OTHER_FILES, SINGLE_FILE, is_kind
from trainers.config.dreambooth_sections import DreamBoothTrainConfig
from trainers.config.family_facts import FamilyFacts, family_facts
from trainers.config.layer_patterns import pattern_problem
from trainers.config.lora_section import TITLES, LoraConfig

STARTS_FROM_BASE = ("pissa", "olora")
CONVOLUTIONS = "attention+mlp+conv"
LORA_PRESETS = ("attention", "attention+mlp", CONVOLUTIONS, "all-linear")


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
    if lora.target_modules == CONVOLUTIONS and facts.kohya.denoiser != "unet":
        message = f"the blocks of {facts.title} have no convolutions: use attention+mlp"
        yield "lora.target_modules", message
    yield from pattern_errors("lora.rank_pattern", lora.rank_pattern, facts)
    yield from pattern_errors("lora.alpha_pattern", lora.alpha_pattern, facts)


def pattern_errors(key: str, patterns: Mapping[str, float], facts: FamilyFacts) -> Errors:
    """Patterns that are no regex, or take too long; which layers they name is seen later."""
    for pattern in patterns:
        problem = "a pattern is empty" if not pattern else pattern_problem(pattern, facts)
        if problem:
            yield key, problem


def start_errors(lora: LoraConfig, quantization: str) -> Errors:
    """What a start that takes a part of the base's weights cannot be combined with."""
    if lora.init_lora_weights not in STARTS_FROM_BASE:
        return
    conflicts = {
        "lora.use_dora": lora.use_dora,
        "lora.dropout": lora.dropout > 0,
        "lora.init_from": lora.init_from is not None,
        f"model.quantization={quantization}": quantization in ("nf4", "int8"),
    }
    others = [path for path, is_set in conflicts.items() if is_set]
    if others:
        message = (
            f"{lora.init_lora_weights} starts plain LoRA with a part of each whole weight, and "
            f"cannot be combined with {', '.join(others)}: remove one of them"
        )
        yield "lora.init_lora_weights", message


def kind_errors(lora: LoraConfig, quantization: str, compiles: bool) -> Errors:
    """What LoKr and LoHa cannot be combined with, and keys that are theirs alone."""
    for key in ("decompose_factor", "decompose_both"):
        if lora.type != "lokr" and getattr(lora, key) != LoraConfig.model_fields[key].default:
            message = f"has no effect with {lora.type}, only with lokr: remove it"
            yield f"lora.{key}", message
    if lora.type == "lora":
        return
    conflicts = {
        "lora.dropout": lora.dropout > 0,
        "lora.init_lora_weights": lora.init_lora_weights != "gaussian",
        "lora.init_from": lora.init_from is not None,
        "lora.use_dora": lora.use_dora,
        "lora.use_rslora": lora.use_rslora,
        "lora.kohya": bool(lora.kohya),
        f"model.quantization={quantization}": quantization in ("nf4", "int8"),
        "train.compile": compiles,
    }
    others = [path for path, is_set in conflicts.items() if is_set]
    if others:
        message = (
            f"{TITLES[lora.type]} cannot be combined with {', '.join(others)}: remove one of them"
        )
        yield "lora.type", message


def lora_plus_errors(ratio: float | None, lora: LoraConfig | None) -> Errors:
    """A rate for lora_B where there is none."""
    if ratio is None:
        return
    if lora is None:
        message = (
            "all weights are trained, and there is no lora_B with a rate of its own: remove it"
        )
        yield "optimizer.lora_plus_ratio", message
    elif lora.type != "lora":
        message = f"{TITLES[lora.type]} has no lora_B with a rate of its own: remove it"
        yield "optimizer.lora_plus_ratio", message


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
