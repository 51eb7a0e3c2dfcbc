"""A safetensors file: written whole, and one from elsewhere, whose header is checked first."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainers.atomic import replacing_file
from trainers.errors import UserError

# safetensors' own bound on a header, in bytes
MAX_HEADER = 100_000_000

# What files that are not safetensors begin with, and what they are.
SIGNATURES = {
    b"PK\x03\x04": "a PyTorch file (.pt, .bin or .ckpt). Such a file can run programs when it is "
    "read, so it is not opened: convert it to safetensors",
    b"\x80": "a pickle (.pt, .bin or .ckpt). Such a file can run programs when it is read, so it "
    "is not opened: convert it to safetensors",
    b"GGUF": "a GGUF file, whose weights are quantized for other programs",
    b"version https://git-lfs": "the pointer of a large file, not the file: run `git lfs pull`",
    b"<": "a web page: the download went wrong, for example for want of a login",
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # in safetensors' spelling, such as BF16


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file, which was checked against the file's size."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]

    def load(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name, one at a time."""
        with open_safetensors(self.path) as opened:
            for name in self.tensors:
                yield name, opened.get_tensor(name)


def read_header(path: Path) -> TensorFile:
    """The header of a safetensors file. Raises: UserError, which says what the file is instead."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, and not one that PEFT wrote: name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder")
    check_beginning(path)
    with open_safetensors(path) as opened:
        tensors = {}
        # the open file is no mapping
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_slice(name)
            tensors[name] = TensorInfo(tuple(tensor.get_shape()), tensor.get_dtype())
        metadata = opened.metadata() or {}
    if not tensors:
        raise UserError(f"{path}: there is no tensor in it")
    return TensorFile(path, metadata, tensors)


def read_tensor(paths: Iterable[Path], name: str) -> Tensor:
    """One tensor, from that of several files which has it. Raises: UserError if none has."""
    paths = [path for path in paths if path.suffix == ".safetensors"]
    for path in paths:
        with open_safetensors(path) as opened:
            if name in opened.keys():  # noqa: SIM118
                return opened.get_tensor(name)
    found = ", ".join(map(str, paths)) or "no file of weights"
    raise UserError(f"there is no {name} in {found}: fetch the base again")


def check_weights(folder: Path) -> None:
    """Read every file of weights that lies in a folder, as before others get it.

    Raises: UserError for one that is broken off, or holds a number that is NaN or infinite.
    """
    for path in sorted(folder.glob("[!.]*.safetensors")):
        for name, tensor in read_header(path).load():
            if not torch.isfinite(tensor.float()).all():
                raise UserError(f"{path}: {name} holds numbers that are NaN or infinite")


def write_tensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file, which is the new one or, as on a full disk, the old one."""
    with replacing_file(path) as temporary:
        save_file(dict(state), temporary, dict(metadata))


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): download or export it again"
        ) from error


def check_beginning(path: Path) -> None:
    """Raises: UserError where the first bytes are not those of a safetensors file of this size."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            beginning = file.read(32)
            # the length of the header, and then its JSON; the lengths' bytes may be any
            length = int.from_bytes(beginning[:8], "little")
            if size < 9 or length > size - 8 or beginning[8:9] != b"{":
                raise UserError(f"{path} is {describe_beginning(beginning, size)}")
            if length > MAX_HEADER:
                raise UserError(
                    f"{path}: its header has {length} bytes, more than a LoRA file can need"
                )
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    check_duplicates(path, header)


def describe_beginning(beginning: bytes, size: int) -> str:
    """What a file is that is no whole safetensors file."""
    for signature, meaning in SIGNATURES.items():
        if beginning.startswith(signature):
            return meaning
    if size < 9:
        return f"empty or broken off: it has {size} bytes. Download or export it again"
    if beginning[8:9] == b"{":
        length = int.from_bytes(beginning[:8], "little")
        return (
            f"broken off: it has {size} bytes, but its header alone should have {length}. Download "
            "or export it again"
        )
    return "not a safetensors file: it begins with other bytes than such a file"


def check_duplicates(path: Path, header: bytes) -> None:
    """Raises: UserError where a name stands twice in a header, of which readers take one."""

    def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(
                f"{path}: {twice!r} stands twice in its header, so programs would read it "
                "differently: export it again"
            )
        return found

    try:
        json.loads(header, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a safetensors file: its header is not JSON ({error})"
        ) from error
