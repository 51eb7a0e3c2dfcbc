"""The best weights of a run: which validation they are of, and the folder `best/` that has them.

Each checkpoint has `best/` as it was then, so that a run that goes on from it, or back to it, has
the best of its own past. Both are links to the same files where the disk knows links.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from trainers.atomic import replacing_folder, write_atomic
from trainers.config.validation_metrics import DIRECTIONS, HIGHER
from trainers.distributed import deepspeed
from trainers.errors import warn_on_error
from trainers.run_folder import (
    BEST,
    BEST_NAME,
    LORA_NAMES,
    MODEL,
    PIPELINE,
    read_best,
)
from trainers.training.loop import Task, averaged_weights

OWN_NAMES = (*LORA_NAMES, MODEL, PIPELINE, BEST_NAME)


@dataclass
class BestSoFar:
    """The validations of a run up to a step, as far as they decide how it goes on.

    step, value: of the best; value None before the first. mark: the last value that counted as an
    improvement; waited: validations since then.
    """

    step: int = 0
    value: float | None = None
    mark: float | None = None
    waited: int = 0

    def record(self, step: int, value: float, metric: str, min_delta: float = 0.0) -> bool:
        """Note a validation; whether it is the best so far. NaN and equal values are not."""
        sign = 1 if DIRECTIONS[metric] == HIGHER else -1

        def is_above(reference: float | None, margin: float) -> bool:
            if math.isnan(value):
                return False
            return reference is None or sign * (value - reference) > margin

        self.waited += 1
        if is_above(self.mark, min_delta):
            self.mark, self.waited = value, 0
        is_best = is_above(self.value, 0.0)
        if is_best:
            self.step, self.value = step, value
        return is_best


@contextmanager
def result_weights(task: Task, accelerator: Accelerator) -> Iterator[None]:
    """A context in which the main process has what `task.save` writes: averages, and all parts of
    them. Every process must enter it."""
    with ExitStack() as stack:
        stack.enter_context(averaged_weights(task))
        for player in task.players.values():
            stack.enter_context(deepspeed.gathered_weights(player.module, accelerator))
        yield


def write_best(
    run: Path, save: Callable[[Path], None], step: int, metric: str, value: float
) -> None:
    """Put weights in place of those in `best/`: all of them, or none on a failure.

    save: writes them into the folder that it is given.
    """
    with replacing_folder(run / BEST) as folder:
        save(folder)
        record = {"step": step, "metric": metric, "value": value}
        write_atomic(folder / BEST_NAME, json.dumps(record) + "\n")
        flush_files(folder)


def flush_files(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def holds(folder: Path, best: BestSoFar) -> bool:
    """Whether a folder has the weights of that validation."""
    record = read_best(folder)
    return bool(record) and (record["step"], record["value"]) == (best.step, best.value)


def add_best(run: Path, best: BestSoFar, checkpoint: Path) -> None:
    """Put the best weights so far into a checkpoint that is being written, if they are kept."""
    if best.value is not None and holds(run / BEST, best):
        copy_weights(run / BEST, checkpoint / BEST)


def copy_weights(source: Path, target: Path) -> None:
    """Link, or else copy, what a run wrote into a folder `best`; not what the user put there."""
    target.mkdir(exist_ok=True)
    for name in OWN_NAMES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, copy_function=link_or_copy)
        elif (source / name).is_file():
            link_or_copy(source / name, target / name)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def restore_best(run: Path, best: BestSoFar, checkpoint: Path | None) -> None:
    """Make `best/` what it was at a checkpoint: later weights are of another way from there.

    checkpoint: None where the run begins anew.
    """
    folder = run / BEST
    if best.value is not None and holds(folder, best):
        return
    if checkpoint is not None and holds(checkpoint / BEST, best):
        with warn_on_error(f"restoring {folder}"), replacing_folder(folder) as fresh:
            copy_weights(checkpoint / BEST, fresh)
        return
    if best.value is not None and read_best(folder):
        message = (
            f"{checkpoint} has not the weights of its best validation, of step {best.step}: "
            f"{folder} is removed until a better one comes"
        )
        warnings.warn(message, stacklevel=2)
    if read_best(folder):
        remove_weights(folder)


def remove_weights(folder: Path) -> None:
    """Remove what a run wrote into a folder `best`, and the folder if nothing else is in it."""
    # the record first: without it the rest is nobody's best
    for name in reversed(OWN_NAMES):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
