"""The LoRA files of diffusers: PEFT's tensors of all components, and its configs in the header."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.families import Family
from trainers.lora.peft_format import components, from_peft, peft_config, to_peft
from trainers.lora.update import Lora

SUFFIX = ".safetensors"
METADATA_KEY = "lora_adapter_metadata"  # the name of PEFT's configs in diffusers' headers


def recognizes(path: Path) -> bool:
    return path.is_file()


def read(path: Path, family: Family) -> tuple[Lora, list[str]]:
    """The updates in a file of diffusers, or in another one with the same names."""
    flat = json.loads(read_metadata_header(path).get(METADATA_KEY, "{}"))
    configs: dict[str, dict] = {}
    for key, value in flat.items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    return from_peft(add_text_level(load_file(path), family), configs), []


def write(lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
    header = metadata | {"format": "pt", METADATA_KEY: adapter_metadata(lora)}
    save_file(to_peft(lora), path, header)


def read_metadata_header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def adapter_metadata(lora: Lora) -> str:
    """What diffusers keeps of PEFT's configs in a file's header."""
    flat = {}
    for component, updates in components(lora).items():
        for key, value in peft_config(updates).items():
            flat[f"{component}.{key}"] = value
    return json.dumps(flat, indent=2, sort_keys=True)


def add_text_level(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors with the level `text_model.` that transformers 5 leaves out of CLIP's names."""
    renamed = {}
    for key, value in state.items():
        component, _, rest = key.partition(".")
        lacks_level = component in family.clip_encoders and not rest.startswith("text_model.")
        renamed[f"{component}.text_model.{rest}" if lacks_level else key] = value
    return renamed
