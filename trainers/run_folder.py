"""Every name in a run folder, its lock, and what is read back of a run: its config and metrics."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainers.atomic import read_ordinary_file, remove_leftovers, write_atomic
from trainers.config import Config
from trainers.config.loading import parse_tree, read_tree
from trainers.errors import UserError, warn_on_error

# files
CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
STATUS_NAME = "status.json"
CARD_NAME = "README.md"
FIGURES_NAME = "figures.json"
EVALUATION_NAME = "evaluation.json"
REPORT_NAME = "report.html"
PUBLIC_REPORT_NAME = "report_public.html"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"
LORA_NAMES = (WEIGHT_NAME, KOHYA_NAME)
LOCK_NAME = ".lock"
OWNER_NAME = ".owner"

# folders
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
MODEL = "model"
PIPELINE = "pipeline"
CACHE = "cache"
CLASS_PICTURES = "class_images"
TRACKING = "tracking"
EVALUATION = "evaluation"
BEST = "best"
PUSH = ".push"

# within a folder of samples, a checkpoint, a cache
FINAL = "final"
GRID_NAME = "grid.png"
MANIFEST_NAME = "manifest.json"
OPTIMIZER_SUFFIX = ".optimizer.pt"
BEST_NAME = "best.json"
BASE_DIGESTS_NAME = "base_files.json"
PICTURES_NAME = "pictures.json"
ENTRIES_NAME = "entries.json"


# in a line of metrics.jsonl with a validation: what it took
VALIDATION_SECONDS = "validation_seconds"


def step_name(step: int) -> str:
    """The name of what belongs to a step: a checkpoint, a folder of samples."""
    return f"step-{step:06d}"


def parse_step(name: str) -> int | None:
    """The step in a name that `step_name` gives; None for every other name."""
    match = re.fullmatch(r"step-([0-9]{6,})", name)
    # not step-0000004, which we never write
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def step_folders(root: Path) -> dict[int, Path]:
    """The folders in `root` that are named after a step, by their steps, the lowest first.

    Whatever else lies there is not ours, such as an archive, or a copy, of one of them.
    """
    if not root.is_dir():
        return {}
    folders = {}
    for path in root.iterdir():
        step = parse_step(path.name)
        if step is not None and path.is_dir():
            folders[step] = path
    return dict(sorted(folders.items()))


def list_checkpoints(root: Path) -> list[Path]:
    """Those in a folder of checkpoints, complete or not, newest first."""
    folders = reversed(step_folders(root).values())
    return [folder for folder in folders if not has_lora_alone(folder)]


def lora_folders(root: Path) -> dict[int, Path]:
    """The folders in `root` with the LoRA of a step, by their steps, the lowest first."""
    folders = step_folders(root).items()
    return {step: folder for step, folder in folders if (folder / WEIGHT_NAME).is_file()}


def has_lora_alone(folder: Path) -> bool:
    """Whether a folder is what stays of an old checkpoint: its LoRA without a state to resume."""
    if not (folder / WEIGHT_NAME).is_file() or (folder / MANIFEST_NAME).exists():
        return False
    return not any(path.name.endswith(OPTIMIZER_SUFFIX) for path in folder.iterdir())


def sample_grids(run: Path) -> list[Path]:
    """The grids of the samples during training, oldest first."""
    grids = [folder / GRID_NAME for folder in step_folders(run / SAMPLES).values()]
    return [grid for grid in grids if grid.is_file()]


def read_run_config(run: Path) -> Config:
    """The config of a run, finished or not; its data may be gone.

    Raises: UserError that names each mistake in it, for nothing may stand in for what was trained.
    """
    path = run / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG_NAME}")
    config, mistakes = parse_tree(read_tree(path))
    if mistakes:
        raise UserError("\n".join(f"{path}: {mistake}" for mistake in mistakes.values()))
    return config


def load_run_config(run: Path, kind: str = "") -> Config:
    """The config of a finished run.

    Raises: UserError when the folder is no run of that kind, if one is given, or is not finished.
    """
    config = read_run_config(run)
    if kind and config.kind != kind:
        raise UserError(f"{run} is a run of {config.kind}, not of {kind}")
    check_finished(run, config)
    return config


def check_finished(run: Path, config: Config) -> None:
    """Raises: UserError for a run that has no result yet."""
    result = MODEL
    if config.kind == "dreambooth":
        result = WEIGHT_NAME if config.lora else PIPELINE
    if not (run / result).exists():
        raise UserError(f"{run} is not finished: it has no {result}. {continue_hint(run)}")


def continue_hint(run: Path) -> str:
    """How training goes on in the folder of a run that was stopped."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
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


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each an object with the number of its step; [] without the file.

    Others are left out with a warning, such as the half line of a killed run or damaged bytes.
    """
    path = run / METRICS_NAME
    if not path.is_file():
        return []
    rows, damaged = [], []
    # split as bytes: text may hold other ends of lines, and need not be text at all
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        row = parse_json_line(line)
        step = row.get("step")
        # a truth value is an int to Python
        if type(step) is int and 0 <= step < 2**63:
            rows.append(row)
        elif line.strip():
            damaged.append(str(number))
    if damaged:
        some = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        warnings.warn(
            f"{path}: {len(damaged)} damaged lines are left out (line {some})", stacklevel=2
        )
    return rows


def read_best(folder: Path) -> dict[str, Any]:
    """Step, metric and value of the weights in a folder `best`; empty where it has none."""
    try:
        record = parse_json_line(read_ordinary_file(folder / BEST_NAME))
    except OSError:
        return {}
    is_whole = type(record.get("step")) is int and isinstance(record.get("metric"), str)
    return record if is_whole and isinstance(record.get("value"), (int, float)) else {}


def parse_json_line(text: str | bytes) -> dict[str, Any]:
    """A JSON object; empty for what is none, such as the last line of a killed run."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other runs out of it; the system forgets the claim of a process
    that dies.

    Raises: UserError when it is taken or cannot be written to.
    """
    lock, owner = FileLock(folder / LOCK_NAME, blocking=False), folder / OWNER_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_NAME).touch()
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder} ({error.strerror})") from None
    try:
        lock.acquire()
    except Timeout:
        user = owner.read_text("utf-8", "replace") if owner.is_file() else "another process"
        raise UserError(
            f"output_dir: {folder} is in use ({user}): wait for its end, or choose another"
        ) from None
    except (OSError, NotImplementedError):  # a network disk without locks
        warnings.warn(
            f"{folder} cannot be locked: see to it that no other run uses it", stacklevel=2
        )
    try:
        if lock.is_locked:
            remove_leftovers(folder)
        with warn_on_error("noting who uses the run folder"):
            write_atomic(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
