"""Every name in a run folder, its lock, atomic writes, and the config of a finished run."""

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

from filelock import FileLock, Timeout

from trainers.config import Config
from trainers.config.loading import parse_yaml, validate
from trainers.errors import UserError, warn_on_error

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"


def list_checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    return sorted(root.glob("step-*"), reverse=True)


def load_run_config(run: Path, kind: str = "") -> Config:
    """The config of a finished run, whose data may be gone.

    Raises: UserError when the folder is no run of that kind, if one is given, or is not finished.
    """
    try:
        config, _ = validate(parse_yaml((run / "config.yaml").read_text()))
    except OSError:
        raise UserError(f"{run} is no run folder: it has no config.yaml") from None
    if kind and config.kind != kind:
        raise UserError(f"{run} is a run of {config.kind}, not of {kind}")
    result = "model"
    if config.kind == "dreambooth":
        result = WEIGHT_NAME if config.lora else "pipeline"
    if not (run / result).exists():
        raise UserError(f"{run} is not finished: it has no {result}. {continue_hint(run)}")
    return config


def continue_hint(run: Path) -> str:
    """How training goes on in the folder of a run that was stopped."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        return "It has no checkpoint either: the same command starts from step 0"
    return f"The same command goes on from its checkpoint {checkpoints[0].name}"


def append_line(path: Path, line: str) -> None:
    """All of the line or, as on a full disk, nothing of it."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(line.encode()) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def parse_json_line(text: str) -> dict[str, Any]:
    """A JSON object; empty for what is none, such as the last line of a killed run."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write_atomic(path: Path, text: str) -> None:
    """The new text or, as on a full disk, the old one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other runs out of it; the system forgets the claim of a process
    that dies.

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
        user = owner.read_text() if owner.is_file() else "another process"
        raise UserError(
            f"output_dir: {folder} is in use ({user}): wait for its end, or choose another"
        ) from None
    except (OSError, NotImplementedError):  # a network disk without locks
        warnings.warn(
            f"{folder} cannot be locked: see to it that no other run uses it", stacklevel=2
        )
    try:
        with warn_on_error("noting who uses the run folder"):
            write_atomic(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
