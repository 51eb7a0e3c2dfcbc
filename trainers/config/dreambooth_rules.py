"""Rules between the keys of a DreamBooth config, as (path, message) of each that is broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from trainers.config.base import Config
from trainers.config.base_rules import Errors, SpecialKeys, irrelevant_keys
from trainers.config.base_sections import OptimizerConfig
from trainers.config.dreambooth_data import DataConfig
from trainers.config.dreambooth_sections import (
    DreamBoothTrainConfig,
    ModelConfig,
)
from trainers.config.family_facts import families_with, family_facts, family_names
from trainers.config.lora_section import LoraConfig

HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
MAX_PROMPT_SHOWN = 60  # characters
SINGLE_FILE = ".safetensors"
OTHER_FILES = (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")


def base_errors(model: ModelConfig) -> Errors:
    if problem := base_problem(model.pretrained_model_name_or_path):
        yield "model.pretrained_model_name_or_path", problem
    is_file = model.pretrained_model_name_or_path.lower().endswith(SINGLE_FILE)
    if is_file:
        for key in ("revision", "variant"):
            if getattr(model, key) is not None:
                message = "is for repositories and folders, and the base is a file: set it to null"
                yield f"model.{key}", message
    elif model.config is not None:
        yield "model.config", "is for a base in one file, and this one has its own settings"


def is_single_file(name: str) -> bool:
    """Whether a base model is one file in the layout of its first release."""
    return name.lower().endswith(SINGLE_FILE) and is_kind(Path(name), Path.is_file)


def base_problem(name: str) -> str | None:
    """What keeps a name from being a base model, as far as can be seen without the Hub."""
    path = Path(name)
    if page := HUB_PAGE.match(name):
        return f"{name} is an address: write the name of the repository, {page[1]}"
    if "://" in name:
        return f"{name} is an address: write USER/NAME of a repository on the Hub, or a folder"
    if not name.strip():
        return "must not be empty: write USER/NAME of a repository on the Hub, or a folder"
    if is_single_file(name):
        return None
    if name.lower().endswith(SINGLE_FILE):
        return f"no such file: {name}. Of the Hub a whole repository is named: USER/NAME"
    if name.lower().endswith(OTHER_FILES) or is_kind(path, Path.is_file):
        return (
            f"{name} is a file that is not opened: a pickle (.ckpt, .pt, .bin) can run programs "
            "when it is read, and others hold no whole weights. Take the model's .safetensors "
            "file, or a folder in the diffusers layout"
        )
    is_path = name[0] in "./~" or name.count("/") > 1 or "\\" in name
    if is_path and not is_kind(path, Path.is_dir):
        return f"no such folder: {name}"
    return None


def is_kind(path: Path, test: Callable[[Path], bool]) -> bool:
    """False too where the path is none that the file system takes."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False


def family_errors(config: Config) -> Errors:
    """What the family cannot train with, or does not understand."""
    family = config.model.family
    facts = family_facts(family)
    for side in config.data.resolutions:
        if side % facts.pixel_multiple:
            yield "data.resolution", f"must be a multiple of {facts.pixel_multiple}, not {side}"
    table = []
    for section, key in special_keys():
        table.append(SpecialKeys(families_with(section, key), section, [key]))
    yield from irrelevant_keys(config, family, table)
    for refused, reason in facts.refused.items():
        path, _, value = refused.partition("=")
        section, _, key = path.partition(".")
        if str(getattr(getattr(config, section), key)) == value:
            yield path, reason


def sample_errors(config: Config) -> Errors:
    """Prompts whose own settings cannot be had."""
    multiple = family_facts(config.model.family).pixel_multiple
    for sample in config.validation.samples:
        path = f"validation.prompts[{sample.prompt[:MAX_PROMPT_SHOWN]}]"
        if "prompt" not in sample.model_fields_set:
            yield f"{path}.prompt", "a prompt with settings of its own has to have a text"
        if sample.size and (sample.width or sample.height):
            yield f"{path}.size", "cannot be combined with width and height: remove one of them"
        for key in ("size", "width", "height"):
            side = getattr(sample, key)
            if side and side % multiple:
                yield f"{path}.{key}", f"must be a multiple of {multiple}, not {side}"
        if sample.lora_scale is not None and config.lora is None:
            yield f"{path}.lora_scale", "there is no LoRA where all weights are trained: remove it"


def likeness_errors(config: Config) -> Errors:
    """Pictures to compare with the photos, and no prompt to draw them by."""
    validation = config.validation
    if validation.likeness_pictures and not config.data.instance_prompts:
        message = "requires data.instance_prompt, by which the subject is drawn"
        yield "validation.likeness_pictures", message
    if validation.likeness_network and not validation.likeness_pictures:
        message = "has no effect unless validation.likeness_pictures is more than 0"
        yield "validation.likeness_network", message


def special_keys() -> list[tuple[str, str]]:
    """Section and key of what some families understand and others do not."""
    found = {}
    for name in family_names():
        for section, keys in family_facts(name).config_keys.items():
            found |= {(section, key): None for key in keys}
    return list(found)


def prior_errors(data: DataConfig, lora: LoraConfig | None) -> Errors:
    """What the base's own predictions require: a base that stays as it is."""
    if data.preserves_outputs and lora is None:
        message = (
            "output_preservation asks the base for its predictions while the LoRA is off, and "
            "lora: null changes the base itself: set lora, or data.prior=class_images"
        )
        yield "data.prior", message


def memory_errors(
    model: ModelConfig, lora: LoraConfig | None, train: DreamBoothTrainConfig
) -> Errors:
    """Options that need less memory, and what they need themselves."""
    has_checkpointing = train.gradient_checkpointing is True
    if model.quantization != "none" and lora is None:
        message = (
            "the weights of a quantized base model cannot be trained: set lora, or set "
            "model.quantization to none"
        )
        yield "model.quantization", message
    if model.modulation_cache and (lora is None or train.train_text_encoder):
        message = (
            "requires a frozen base model and frozen text encoders, because the outputs are "
            "computed in advance"
        )
        yield "model.modulation_cache", message
    if model.modulation_cache and model.quantization in ("nf4", "int8"):
        message = (
            f"cannot be combined with model.quantization={model.quantization}, which already "
            "shrinks these weights: remove one of them"
        )
        yield "model.modulation_cache", message
    if model.offload and (lora is None or not has_checkpointing):
        message = (
            "requires lora and train.gradient_checkpointing: true, so that the backward pass loads "
            "each block again"
        )
        yield "model.offload", message
    if model.offload and model.quantization != "none":
        message = (
            f"cannot be combined with model.quantization={model.quantization}, which already "
            "shrinks the blocks: remove one of them"
        )
        yield "model.offload", message
    is_refused = "model.quantization=fp8" in family_facts(model.family).refused
    if model.quantization == "fp8" and not is_refused and not has_checkpointing:
        message = (
            "fp8 requires train.gradient_checkpointing: true, because its weights are cast again "
            "for each pass"
        )
        yield "model.quantization", message


def speed_errors(
    model: ModelConfig, lora: LoraConfig | None, train: DreamBoothTrainConfig
) -> Errors:
    """What a compiled denoiser cannot be combined with."""
    conflicts = {
        "model.quantization": model.quantization != "none",
        "model.offload": model.offload,
        "lora.use_dora": lora is not None and lora.use_dora,
    }
    others = [path for path, is_set in conflicts.items() if is_set]
    if train.compile and others:
        message = f"cannot be combined with {', '.join(others)}: remove one of them"
        yield "train.compile", message


def training_errors(optimizer: OptimizerConfig, train: DreamBoothTrainConfig) -> Errors:
    if optimizer.text_encoder_lr is not None and not train.train_text_encoder:
        message = "the text encoder does not train: set train.train_text_encoder: true"
        yield "optimizer.text_encoder_lr", message
