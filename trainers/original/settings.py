"""What a base in one file needs besides: configs, tokenizers, and the parts that it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from trainers.config import ModelConfig
from trainers.data.file_digests import TEXT_SUFFIXES, part_files
from trainers.errors import UserError
from trainers.original.checkpoint import Checkpoint
from trainers.original.weights import WEIGHT_NAMES

INDEX_NAME = "model_index.json"
SETTINGS_FILES = tuple(f"*{suffix}" for suffix in TEXT_SUFFIXES)
# what a pipeline may have and no training needs
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def find_settings(model: ModelConfig, checkpoint: Checkpoint) -> Path:
    """The folder with the configs and tokenizers of the pipeline that a file is of."""
    name = model.config or default_settings(checkpoint)
    if Path(name).is_dir():
        if not (Path(name) / INDEX_NAME).is_file():
            raise UserError(f"model.config: {name} has no {INDEX_NAME}, so it is no pipeline")
        return Path(name)
    return download(name, checkpoint, SETTINGS_FILES)


def default_settings(checkpoint: Checkpoint) -> str:
    """The repository whose settings fit the file, by the tensors that it has."""
    for part, repository in checkpoint.facts.single_file.settings.items():
        if any(part in name for name in checkpoint.names):
            return repository
    raise AssertionError("the last of a family's settings fits each file")


def download(repository: str, checkpoint: Checkpoint, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:
        raise UserError(
            f"model.config: {checkpoint.path.name} needs settings and parts that are not in it, "
            f"and those of {repository!r} cannot be fetched ({error}). Set model.config (for "
            "generate.py and export.py: --base-config) to a local folder of a pipeline of this "
            "kind, in the diffusers layout"
        ) from error


def find_lacking(
    model: ModelConfig, checkpoint: Checkpoint, settings: Path, lacking: Sequence[str]
) -> Path:
    """The settings, with the weights of the parts that the file lacks. Raises: UserError."""
    name = model.config or default_settings(checkpoint)
    if lacking and not Path(name).is_dir():
        patterns = [*SETTINGS_FILES]
        for part in lacking:
            # and not those of a variant, which has its name after the stem
            for stem in WEIGHT_NAMES.values():
                patterns += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*-of-*.safetensors"]
        settings = download(name, checkpoint, patterns)
    for part in lacking:
        if not any(path.suffix == ".safetensors" for path in weight_files(settings / part)):
            raise UserError(
                f"model.config: {checkpoint.path.name} has no {part}, and {settings} has no "
                f"weights of one in {part}/*.safetensors: set model.config to a folder or "
                "repository in the diffusers layout that has them"
            )
    return settings


def read_index(settings: Path) -> dict[str, Any]:
    """What the index of a pipeline says. Raises: UserError."""
    try:
        index = json.loads((settings / INDEX_NAME).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.config: {settings / INDEX_NAME} cannot be read ({error}): fetch it again"
        ) from error
    if not isinstance(index, dict):
        raise UserError(f"model.config: {settings / INDEX_NAME} is no index of a pipeline")
    return index


def read_components(settings: Path, model: ModelConfig) -> dict[str, list[str]]:
    """The components of the pipeline that are used, with the library and class of each."""
    components = {}
    for name, value in read_index(settings).items():
        left_out = model.text_encoder_3 is None and name.endswith("_3")
        if isinstance(value, list) and value[0] and name not in UNUSED and not left_out:
            components[name] = value
    return components


def is_model(kind: Sequence[str]) -> bool:
    """Whether a component has weights: a tokenizer and a scheduler have none. Raises: UserError."""
    library, name = kind
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    component_class = getattr(module, name, None)
    if component_class is None:
        raise UserError(
            f"model.config: its {INDEX_NAME} names {name} of {library}, and the installed "
            "diffusers and transformers have no such class: take the folder of a plain pipeline"
        )
    return issubclass(component_class, nn.Module)


def setting_files(folder: Path) -> Iterator[Path]:
    """Configs and tokenizers of a pipeline; tables of weights are none."""
    for path in [*folder.glob("*.json"), *folder.glob("*/*")]:
        is_table = path.name.endswith(".safetensors.index.json")
        if path.is_file() and path.suffix in TEXT_SUFFIXES and not is_table:
            yield path


def weight_files(folder: Path) -> Iterator[Path]:
    """The weights of a component that are loaded without a variant, and their table."""
    for path in part_files(folder, None):
        if path.suffix not in TEXT_SUFFIXES:
            yield path
    for stem in WEIGHT_NAMES.values():
        yield from folder.glob(f"{stem}.safetensors.index.json")
