"""The LoRA formats of other programs: a row of a table each, and a module that reads and writes it.

Nothing here imports torch, so that a script knows the formats before it has read its arguments.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.families import Family
    from trainers.lora.update import Lora


class LoraFormat(Protocol):
    """What the module of a format has."""

    SUFFIX: str  # what its file names end with; empty for a folder

    def recognizes(self, path: Path) -> bool:
        """Whether the file or folder has this format."""

    def read(self, path: Path, family: Family) -> tuple[Lora, list[str]]:
        """The updates, and the names in the file that belong to no layer of the base.

        Raises: UserError for what is not plain LoRA.
        """

    def write(self, lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
        """A file or folder with the updates; metadata: what its header says, if it has one."""


# A file has the first format that recognizes it; the last one takes any file.
FORMATS = {
    "peft": "trainers.lora.peft_format",
    "kohya": "trainers.lora.kohya",
    "diffusers": "trainers.lora.diffusers_format",
}


def load_format(name: str) -> LoraFormat:
    return import_module(FORMATS[name])


def detect_format(path: Path) -> LoraFormat:
    """The format of a LoRA file or PEFT folder. Raises: UserError where there is none."""
    for name in FORMATS:
        lora_format = load_format(name)
        if lora_format.recognizes(path):
            return lora_format
    raise UserError(f"{path}: there is no such file or folder")
