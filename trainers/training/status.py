"""The state of a run, which its process writes for whoever looks at the run folder."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from trainers.atomic import write_atomic
from trainers.progress import is_terminal
from trainers.run_folder import STATUS_NAME, parse_json_line

RUNNING, FINISHED, STOPPED, FAILED, GONE = "running", "finished", "stopped", "failed", "gone"
MAX_WARNINGS = 5
MAX_TEXT = 500  # characters of a warning or a message
# two readings of one process's start may differ by their rounding
START_SECONDS = 2.0


@dataclass(frozen=True)
class RunStatus:
    """How far a run is; times are in seconds since 1970.

    state: GONE for a run whose process ended without a word, as after a power failure. message:
    what was said at its end. seconds_left: None where no step tells it yet.
    """

    state: str
    step: int
    last_step: int
    updated_at: float
    seconds_left: float | None = None
    message: str = ""
    warnings: list[str] = field(default_factory=list)
    host: str = ""
    process: int = 0
    process_started_at: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING


def new_status(state: str, step: int, last_step: int) -> RunStatus:
    """The status of a run of this process, now."""
    host, process = socket.gethostname(), os.getpid()
    started_at = psutil.Process(process).create_time()
    identity = {"host": host, "process": process, "process_started_at": started_at}
    return RunStatus(state, step, last_step, time.time(), **identity)


def write_status(folder: Path, status: RunStatus) -> None:
    write_atomic(folder / STATUS_NAME, json.dumps(asdict(status)) + "\n")


def read_status(folder: Path) -> RunStatus | None:
    """The status of the run in a folder; None where it has none, or one that is not to be read."""
    try:
        values = parse_json_line((folder / STATUS_NAME).read_bytes())
    except OSError:
        return None
    status = parse_status(values)
    if status and status.is_running and has_ended(status):
        return RunStatus(**asdict(status) | {"state": GONE, "seconds_left": None})
    return status


def parse_status(values: dict) -> RunStatus | None:
    """The status in the object of a file that anyone may have changed; None if it is none."""
    numbers = {"step": 0, "last_step": 0, "updated_at": 0.0, "process": 0}
    for name in ("step", "last_step", "updated_at", "process", "process_started_at"):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if not math.isfinite(value) or not 0 <= value < 2**53:
            return None
        numbers[name] = value
    left, texts = values.get("seconds_left"), values.get("warnings")
    is_number = isinstance(left, (int, float)) and math.isfinite(left) and 0 <= left < 1e9
    return RunStatus(
        state=str(values.get("state")),
        seconds_left=left if is_number else None,
        message=str(values.get("message", "")),
        warnings=[str(text) for text in texts] if isinstance(texts, list) else [],
        host=str(values.get("host")),
        **numbers,
    )


def has_ended(status: RunStatus) -> bool:
    """Whether the process that wrote a status is known to be no more."""
    if status.host != socket.gethostname():
        return False
    try:
        started_at = psutil.Process(int(status.process)).create_time()
    except (psutil.NoSuchProcess, OverflowError):
        return True
    except psutil.Error:
        return False
    return abs(started_at - status.process_started_at) > START_SECONDS


@contextmanager
def recorded_warnings() -> Iterator[deque[str]]:
    """Inside, the newest warnings are kept beside being shown, which does not break the bar."""
    kept: deque[str] = deque(maxlen=MAX_WARNINGS)
    show = warnings.showwarning

    def record(message, category, filename, lineno, file=None, line=None) -> None:  # noqa: PLR0913
        text = " ".join(str(message).split())[:MAX_TEXT]
        if text not in kept:
            kept.append(text)
        if file is None and is_terminal():
            with tqdm.external_write_mode():
                show(message, category, filename, lineno, file, line)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = record
    try:
        yield kept
    finally:
        warnings.showwarning = show
