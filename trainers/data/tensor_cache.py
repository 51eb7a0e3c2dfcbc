"""Named tensors on disk, a file for each key, and the recently used ones in memory."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainers.atomic import replacing_file
from trainers.data.known_values import KnownValues, settled_state, values_checksum
from trainers.run_folder import ENTRIES_NAME

MAX_BYTES = 2 * 2**30  # of the entries that are kept in memory, where there is enough of it
MEMORY_SHARE = 4  # at most a quarter of the machine's, shared by its processes


class TensorCache:
    """Named tensors by key, in one safetensors file for each, with a checksum of key and content.

    A file is written under another name and then renamed, so that it is whole or absent. Which
    files were found to be intact is remembered in ENTRIES_NAME, so that the next run need not read
    those that have not changed; whatever is read for training is compared with its checksum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recent = RecentTensors(memory_limit())
        self.states, self.written = KnownValues(), set[str]()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or None as for `read_file`; in pinned memory if there is a GPU, so that the
        host need not wait for copies."""
        tensors = self.recent.get(key)
        if tensors is None and (tensors := self.read_file(key)) is not None:
            # what was read is the file, mapped, and there may not be many such maps
            copy = Tensor.pin_memory if torch.cuda.is_available() else Tensor.clone
            tensors = {name: copy(tensor) for name, tensor in tensors.items()}
            self.recent.put(key, tensors)
        return tensors

    def read_file(self, key: str) -> dict[str, Tensor] | None:
        """The entry as the file holds it now, or None if it is absent, damaged or another one."""
        path = self.path(key)
        # a pipe of that name would be waited for
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("sha256")
                return tensors if entry_checksum(key, tensors) == expected else None
        except (OSError, SafetensorError):
            return None

    def is_intact(self, key: str) -> bool:
        """Whether the entry is there and undamaged; one that was, and whose file has not changed,
        is not read again."""
        state = settled_state(self.path(key))
        if state is not None and self.states.known.get(key) == state:
            return True
        is_intact = self.read_file(key) is not None
        if is_intact and state is not None:
            self.states.known[key] = state
        return is_intact

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        # other processes may be writing the same entry
        with replacing_file(path) as temporary:
            save_file(tensors, temporary, {"sha256": entry_checksum(key, tensors)})
        self.recent.drop(key)
        self.written.add(key)

    def load_states(self) -> None:
        self.states.load(self.folder / ENTRIES_NAME)

    def save_states(self) -> None:
        """Remember which entries are intact for the next run."""
        for key in self.written:
            if state := settled_state(self.path(key)):
                self.states.known[key] = state
        self.written.clear()
        self.states.save()

    def discard(self, key: str) -> None:
        """Let the next run make an entry again that cannot be read, and look at all others."""
        for path in (self.path(key), self.folder / ENTRIES_NAME):
            with suppress(OSError):
                path.unlink()


class RecentTensors:
    """Tensors by key; those that were not used for longest go when all have over `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.entries: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def get(self, key: str) -> dict[str, Tensor] | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        self.drop(key)
        self.entries[key] = tensors
        self.num_bytes += count_bytes(tensors)
        while self.num_bytes > self.max_bytes:
            self.drop(next(iter(self.entries)))

    def drop(self, key: str) -> None:
        if key in self.entries:
            self.num_bytes -= count_bytes(self.entries.pop(key))


def count_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def memory_limit() -> int:
    """The bytes of entries that this process may keep in memory."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share = psutil.virtual_memory().total // MEMORY_SHARE // num_processes
    return min(MAX_BYTES, share)


def entry_checksum(key: str, tensors: dict[str, Tensor]) -> str:
    """A SHA-256 of the key, for files may be exchanged, and of names, types, shapes and values."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(**facts: object) -> str:
    """A SHA-256 of what an entry depends on; the facts must be JSON values."""
    return values_checksum(facts)
