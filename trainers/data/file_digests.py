"""Digests of files, and of the parts of a base model by those of their files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from trainers.atomic import read_ordinary_file, write_atomic
from trainers.errors import warn_on_error

# the settings and vocabularies of a part; weights are told by their own endings
TEXT_SUFFIXES = (".json", ".txt", ".model")
WEIGHT_SUFFIXES = (".safetensors", ".bin")  # the first that is there is loaded
SHA256 = re.compile("[0-9a-f]{64}")


class FileDigests:
    """The SHA-256 of files; one is read once, as long as its size and times stay.

    `load` names a JSON file in which `save` remembers them for the next run, with a checksum: a
    damaged digest would tell of another base model.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.num_stored = 0
        self.store: Path | None = None

    def load(self, store: Path) -> None:
        self.store = store
        try:
            stored = json.loads(read_ordinary_file(store))
            known, checksum = stored["files"], stored["sha256"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return
        if isinstance(known, dict) and checksum == digests_checksum(known):
            self.known = known | self.known
            self.num_stored = len(self.known)

    def __call__(self, path: Path) -> str:
        blob = path.resolve()
        # the Hub's cache names large files by their SHA-256
        if path.is_symlink() and blob.parent.name == "blobs" and SHA256.fullmatch(blob.name):
            return blob.name
        status = blob.stat()
        # the last of the times cannot be set, so it tells of changes that hide themselves
        times = (status.st_mtime_ns, status.st_ctime_ns)
        key = " ".join(map(str, (blob, status.st_size, *times)))
        if key not in self.known:
            self.known[key] = read_digest(blob)
        return self.known[key]

    def save(self) -> None:
        """Write what is known to the store, if there is more. A failure is a warning."""
        if self.store is None or len(self.known) == self.num_stored:
            return
        with warn_on_error(f"writing {self.store}"):
            self.store.parent.mkdir(parents=True, exist_ok=True)
            stored = {"files": self.known, "sha256": digests_checksum(self.known)}
            write_atomic(self.store, json.dumps(stored, indent=1) + "\n")
            self.num_stored = len(self.known)


def digests_checksum(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


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
