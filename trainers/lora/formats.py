"""The LoRA formats of programs: a row of a table each, and a module that knows its names.

Nothing here imports torch, so that a script knows the formats before it has read its arguments.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainers.families import Family
    from trainers.lora.update import Lora, Rows


class LoraNames(Protocol):
    """What the module of a format has that is read."""

    def layer_names(self, family: Family) -> dict[str, Rows]:
        """Every name that a layer of the base can have in its files, without the tensors' own."""


class LoraFormat(LoraNames, Protocol):
    """What the module of a format has that is written too."""

    SUFFIX: str  # what its file names end with; empty for a folder

    def write(self, lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
        """A file or folder with the updates; metadata: what its header says, if it has one.

        Raises: UserError for what the format cannot hold.
        """


# What is written, and read.
FORMATS = {
    "peft": "trainers.lora.peft_format",
    "kohya": "trainers.lora.kohya",
    "diffusers": "trainers.lora.diffusers_format",
}

# What is read only.
READ_FORMATS = {
    "old_diffusers": "trainers.lora.old_diffusers",
    "comfyui": "trainers.lora.comfyui",
    "released_unet": "trainers.lora.released_unet",
    "onetrainer": "trainers.lora.onetrainer",
    "simpletuner": "trainers.lora.simpletuner",
    "xlabs": "trainers.lora.xlabs",
}


def load_format(name: str) -> LoraFormat:
    return import_module(FORMATS[name])


def all_layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the base has in any format: a file may mix several."""
    names = {}
    for module in (*FORMATS.values(), *READ_FORMATS.values()):
        names |= import_module(module).layer_names(family)
    return names
