"""What goes wrong around a run: explained in a message, or survived."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from . import RunFailedError, UserError
from .sections import Config

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
GONE = ("closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "gloo")  # in lower case


@contextmanager
def explained(config: Config, processes: int) -> Iterator[None]:
    """Failures that lie outside of the code become a `RunFailedError` that tells what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        if out_of_memory(error):
            wishes = "\n".join(f"  {wish}" for wish in config.lighter())
            raise RunFailedError(
                f"out of memory ({said[:200]}). The cheapest remedies first:\n{wishes}\n{kept(config)}"
            ) from error
        if full(error):
            raise RunFailedError(f"the disk is full ({said}). Free some space. {kept(config)}") from error
        if isinstance(error, OSError) and error.errno in REFUSED:
            raise RunFailedError(f"{said}. {kept(config)}") from error
        if processes > 1 and any(word in said.lower() for word in GONE):
            raise RunFailedError(f"another process ended or hangs ({said[:200]}). {kept(config)}") from error
        raise


def out_of_memory(error: Exception) -> bool:
    """Whether the host's memory or an accelerator's is used up, also as told by CUDA itself and by its libraries."""
    return should_reduce_batch_size(error) or any(words in str(error) for words in OUT_OF_MEMORY)


def full(error: Exception) -> bool:
    """Whether the disk is, also as told by safetensors, which has its own error."""
    return getattr(error, "errno", None) in FULL or "No space left" in str(error) or "StorageFull" in str(error)


def kept(config: Config) -> str:
    """What remains, and how to go on."""
    from .checkpoint import checkpoints

    found = checkpoints(config.output_dir / "checkpoints")
    if not found:
        return "There is no checkpoint yet: the same command begins anew"
    return f"The checkpoint {found[0].name} is intact: the same command goes on from it"


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """A failure of what training does not need is told, and training goes on."""
    try:
        yield
    except Exception as error:  # trackers and their servers raise whatever they like
        warnings.warn(f"{what} failed ({type(error).__name__}: {error}); training goes on", stacklevel=3)


def loads(text: str) -> dict[str, Any]:
    """A JSON object; empty for what is none, such as the last line of a killed run."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write_whole(path: Path, text: str) -> None:
    """The new text or, as on a full disk, the old one."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, "utf-8")
    aside.replace(path)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other runs out of it; the system forgets the claim of a process that dies.

    Raises: UserError when it is taken or cannot be written to.
    """
    lock, owner = FileLock(folder / ".lock", blocking=False), folder / ".owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder} ({error.strerror})") from None
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise UserError(f"output_dir: {folder} is in use ({who}): wait for its end, or choose another") from None
    except (OSError, NotImplementedError):  # a network disk without locks
        warnings.warn(f"{folder} cannot be locked: see to it that no other run uses it", stacklevel=2)
    try:
        with tolerated("noting who uses the run folder"):
            write_whole(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
