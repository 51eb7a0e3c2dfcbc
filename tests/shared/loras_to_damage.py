"""LoRA files of every format that is read, for the fuzzer to damage."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.families import Family
from trainers.lora.formats import FORMATS, load_format
from trainers.lora.update import Lora

State = dict[str, Tensor]


def renamed(state: State, changes: dict[str, str]) -> State:
    result = {}
    for key, value in state.items():
        for old, new in changes.items():
            key = key.replace(old, new)
        result[key] = value.contiguous()
    return result


PEFT_ENDS = {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"}
OLD_ENDS = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
RENAMINGS = {
    "default": ("diffusers", PEFT_ENDS),
    "old_diffusers": ("diffusers", OLD_ENDS),
    "half": ("kohya", {}),
}


def make_files(root: Path, family: Family, lora: Lora) -> list[Path]:
    """One file or folder for each format."""
    paths = []
    for name in FORMATS:
        path = root / f"{name}{load_format(name).SUFFIX}"
        load_format(name).write(lora, family, path, {})
        paths.append(path)
    for name, (source, changes) in RENAMINGS.items():
        state = renamed(load_file(root / f"{source}.safetensors"), changes)
        if name == "half":
            state = {key: value.half() for key, value in state.items()}
        path = root / f"{name}.safetensors"
        save_file(state, path)
        paths.append(path)
    return paths
