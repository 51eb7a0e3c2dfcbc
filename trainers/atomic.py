"""Files and folders that are found whole or not at all, whenever a program is killed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from trainers.errors import UserError

CACHE_VARIABLE = "DIFFUSION_TRAINERS_CACHE"  # another folder than ~/.cache/diffusion-trainers
# what a killed program may leave: .NAME.32 hexadecimal digits.tmp, and an ending of the name's own
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp(\.[^.]+)?")


def cache_home() -> Path:
    """The user's folder for what is made once and may be removed at any time."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or home / "diffusion-trainers")


def aside(path: Path) -> Path:
    """A hidden name beside `path` that no other process, thread or machine takes.

    It ends as the name does, for some writers choose their format by that.
    """
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp{path.suffix}")


def read_ordinary_file(path: Path) -> bytes:
    """Raises: OSError for what is no file, such as a pipe, which nobody may ever write to."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    with open(path, "rb", opener=open_without_waiting) as file:
        content = file.read()
    if content is None:
        raise BlockingIOError(errno.EAGAIN, "it has no content yet", str(path))
    return content


def open_without_waiting(path: str | Path, flags: int) -> int:
    """For `open`: reading gives None where others wait, as for /proc/kmsg, which stat calls a file
    like any other."""
    # Windows has neither such files nor the flag
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A name to write a file to, which takes the place of `path` when the block ends well.

    Raises: UserError when `path` is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written there: move the folder")
    temporary = aside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file: it is the new one or, as on a full disk, the old one."""
    with replacing_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # or a power cut may leave the new name without its content
        os.fsync(file.fileno())


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for files that are renamed into place, and which is gone afterwards."""
    folder = aside(parent / "files")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `path` when the block ends well.

    What only the old folder has at its top, such as a file of the user's, is kept. Raises:
    UserError when `path` is a file.
    """
    # what a link points to is replaced, on its own disk
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be written there: move the file")
    fresh, old = aside(path), path.with_name(f".{path.name}.{uuid4().hex}.old")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if old.exists():
        for entry in old.iterdir():
            if not (path / entry.name).exists():
                entry.rename(path / entry.name)
        shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed programs left aside in `folder`, in which no other may be writing."""
    for path in folder.iterdir():
        if not LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
