"""What was found out about files, remembered for the next run as long as they stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from trainers.atomic import read_ordinary_file, write_atomic
from trainers.errors import warn_on_error

# some disks count time in steps of two seconds: of two changes within one, the second is not seen
SETTLED_SECONDS = 2.0


class KnownValues:
    """JSON values by name, in a file with a checksum: a damaged one is as none.

    `load` names the file, and `save` writes what has been added since.
    """

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.stored: dict[str, Any] = {}
        self.store: Path | None = None

    def load(self, store: Path) -> None:
        self.store = store
        self.stored = read_store(store)
        self.known = self.stored | self.known

    def save(self) -> None:
        """Write what is known, if there is more. A failure is a warning."""
        if self.store is None or self.known == self.stored:
            return
        with warn_on_error(f"writing {self.store}"):
            self.store.parent.mkdir(parents=True, exist_ok=True)
            # another run with the same cache may have added to it
            self.stored = read_store(self.store) | self.known
            content = {"files": self.stored, "sha256": values_checksum(self.stored)}
            write_atomic(self.store, json.dumps(content) + "\n")
            self.known = dict(self.stored)


def read_store(path: Path) -> dict[str, Any]:
    """The values in a file; none of one that is absent or damaged."""
    try:
        content = json.loads(read_ordinary_file(path))
        known, checksum = content["files"], content["sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    is_whole = isinstance(known, dict) and checksum == values_checksum(known)
    return known if is_whole else {}


def values_checksum(values: Any) -> str:
    """The SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def describe_state(status: os.stat_result) -> str:
    """A text that changes with a file: its size, its number on the disk, and its times.

    The last of the times cannot be set, so it tells of changes that hide themselves.
    """
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def settled_state(path: Path) -> str | None:
    """The state of an ordinary file, by which its content is known again.

    None for anything else, and for a file that has changed in the last seconds and may change once
    more without showing it.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    age = time.time() - max(status.st_mtime, status.st_ctime)
    if not stat.S_ISREG(status.st_mode) or age < SETTLED_SECONDS:
        return None
    return describe_state(status)
