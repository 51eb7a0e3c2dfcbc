"""What goes wrong around a run: explained in a message, or survived."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trainers.config import Config
from trainers.errors import RunFailedError
from trainers.out_of_memory import is_out_of_memory
from trainers.run_folder import CHECKPOINTS
from trainers.training.manifest import complete_checkpoints
from trainers.training.process_state import LAUNCHER_VARIABLES, stop_request

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


NO_ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


LOST_PEER_MESSAGES = (
    "closed by peer",
    "connection reset",
    "broken pipe",
    "timed out",
    "nccl",
    "gloo",
)  # in lower case


@contextmanager
def friendly_errors(config: Config, num_processes: int) -> Iterator[None]:
    """Failures that lie outside of the code become a `RunFailedError` that tells what to do, and a
    run that is stopped before it has saved tells what there is."""
    stop_request.advice = lambda: lower_first(resume_hint(config))
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        message = " ".join(str(error).split())
        if is_out_of_memory(error):
            suggestions = "\n".join(f"  {suggestion}" for suggestion in config.memory_suggestions())
            raise RunFailedError(
                f"out of memory ({message[:200]}). The cheapest remedies "
                f"first:\n{suggestions}\n{resume_hint(config)}"
            ) from error
        if is_disk_full(error):
            raise RunFailedError(
                f"the disk is full ({message}). Free some space. {resume_hint(config)}"
            ) from error
        if isinstance(error, OSError) and error.errno in NO_ACCESS_ERRNOS:
            raise RunFailedError(f"{message}. {resume_hint(config)}") from error
        if num_processes > 1 and any(word in message.lower() for word in LOST_PEER_MESSAGES):
            raise RunFailedError(
                f"another process ended or hangs ({message[:200]}). {resume_hint(config)}"
            ) from error
        raise


def is_disk_full(error: Exception) -> bool:
    """Whether the disk is, also as told by safetensors, which has its own error."""
    return (
        getattr(error, "errno", None) in DISK_FULL_ERRNOS
        or "No space left" in str(error)
        or "StorageFull" in str(error)
    )


def lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def resume_command() -> str:
    """The command that started this process, in brackets; nothing where a launcher or another
    program did, whose own command is not known."""
    script = Path(sys.argv[0])
    is_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
    if script.name != "train.py" or is_launched:
        return ""
    return f" (python {shlex.join(sys.argv)})"


def stop_advice(config: Config) -> str:
    """How to go on after a signal, whose checkpoint is the newest."""
    folders = complete_checkpoints(config.output_dir / CHECKPOINTS)
    name = f" {folders[0].name}" if folders else ""
    return f"the same command goes on from the checkpoint{name}{resume_command()}"


def resume_hint(config: Config) -> str:
    """What remains, and how to go on."""
    folders = complete_checkpoints(config.output_dir / CHECKPOINTS)
    if not folders:
        return f"There is no checkpoint yet: the same command starts from step 0{resume_command()}"
    command = f"the same command goes on from it{resume_command()}"
    return f"The checkpoint {folders[0].name} is intact: {command}"
