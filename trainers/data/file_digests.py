"""Digests of files, and of the parts of a base model by those of their files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from trainers.data.known_values import KnownValues, describe_state

# the settings and vocabularies of a part; weights are told by their own endings
TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
WEIGHT_SUFFIXES = (".safetensors", ".bin")  # the first that is there is loaded
SHA256 = re.compile("[0-9a-f]{64}")


class FileDigests(KnownValues):
    """The SHA-256 of files; one is read once, as long as its size and times stay.

    A damaged store would tell of another base model.
    """

    def __call__(self, path: Path) -> str:
        blob = path.resolve()
        # the Hub's cache names large files by their SHA-256
        if path.is_symlink() and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
            return blob.name
        key = f"{blob} {describe_state(blob.stat())}"
        if key not in self.known:
            self.known[key] = read_digest(blob)
        return self.known[key]


def read_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
    return digest.hexdigest()


def part_digest(folder: Path, variant: str | None, digest_file: FileDigests) -> str:
    """The digest of one component: of its settings, and of the weights that are loaded."""
    digest = hashlib.sha256()
    for path in sorted(part_files(folder, variant)):
        digest.update(f"{path.name} {digest_file(path)}\n".encode())
    return digest.hexdigest()


def part_files(folder: Path, variant: str | None) -> Iterator[Path]:
    """The files of a component that decide what it computes.

    The folder may hold the same weights in other formats and precisions too.
    """
    files = [path for path in folder.glob("[!.]*") if path.is_file()]
    for path in files:
        if path.suffix in TEXT_SUFFIXES and "index" not in path.name:
            yield path
    for suffix in WEIGHT_SUFFIXES:
        weights = [path for path in files if path.suffix == suffix]
        chosen = [path for path in weights if variant and f".{variant}" in path.stem]
        chosen = chosen or [path for path in weights if "." not in path.stem]
        if chosen:
            yield from chosen
            return
