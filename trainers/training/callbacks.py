"""What is done after a step, every so many steps: log, sample, checkpoint.

Only here do values leave the device.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from trainers.atomic import write_atomic
from trainers.config import Config
from trainers.distributed.collectives import ProcessGroup
from trainers.errors import warn_on_error
from trainers.run_folder import (
    GRID_NAME,
    METRICS_NAME,
    SAMPLES,
    VALIDATION_SECONDS,
    append_line,
    read_metrics,
    step_name,
)
from trainers.training.checkpoint import save_checkpoint
from trainers.training.loop import StepMetrics, StopReason, Task, averaged_weights
from trainers.training.process_state import stop_request
from trainers.training.progress import make_progress
from trainers.training.run_state import RunState


class LogMetrics:
    """Logs to metrics.jsonl, the trackers and the progress.

    The progress shows step, losses, learning rate, images/s, time left and peak memory.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, rate: Callable[[int], float], start: int
    ) -> None:
        self.config, self.accelerator, self.rate = config, accelerator, rate
        self.file = config.output_dir / METRICS_NAME
        train = config.train
        self.global_batch_size = (
            train.train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
        )
        self.pending: list[StepMetrics] = []
        self.last_step, self.last_time = start, time.perf_counter()
        is_main = accelerator.is_main_process
        self.progress = make_progress(train.max_train_steps, start, is_main)
        # a killed run may have logged steps past its last checkpoint, or half a line
        if is_main and self.file.exists():
            rows = [row for row in read_metrics(config.output_dir) if row["step"] <= start]
            write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        self.pending.append(metrics)
        self.progress.step()
        is_due = step % self.config.tracking.log_every == 0 or VALIDATION_SECONDS in metrics
        if not is_due and step != self.config.train.max_train_steps:
            return
        steps, now = step - self.last_step, time.perf_counter()
        sums, counts = (self.accelerator.reduce(part, "sum") for part in self.reduce_pending())
        values = {name: (sums[name] / counts[name]).item() for name in sorted(sums) if counts[name]}
        for name in ("skipped", "overflowed"):
            if not values.get(name):
                values.pop(name, None)
        if self.accelerator.scaler:
            values["loss_scale"] = self.accelerator.scaler.get_scale()
        values["learning_rate"] = self.config.optimizer.learning_rate * self.rate(step - 1)
        values["images_per_second"] = steps * self.global_batch_size / (now - self.last_time)
        values["peak_memory_gib"] = peak_memory_gib()
        self.pending, self.last_step, self.last_time = [], step, now
        if self.accelerator.is_main_process:
            with warn_on_error("the tracker"):
                self.accelerator.log(values, step=step)
            with warn_on_error(f"writing {self.file}"):
                append_line(self.file, json.dumps({"step": step, **values}) + "\n")
        self.progress.report(step, values)

    def reduce_pending(self) -> tuple[StepMetrics, StepMetrics]:
        """The sums of the finite values, and how many there are of each.

        A skipped step must not spoil the mean, and a player may step less often than others.
        """
        # in the same order in every process
        names = sorted({name for metrics in self.pending for name in metrics})
        stacked = {
            name: torch.stack([metrics[name] for metrics in self.pending if name in metrics])
            for name in names
        }
        is_finite = {name: values.isfinite() for name, values in stacked.items()}
        sums = {name: values.where(is_finite[name], 0).sum() for name, values in stacked.items()}
        return sums, {name: mask.sum() for name, mask in is_finite.items()}


def peak_memory_gib() -> float:
    """GiB: the accelerator's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class SamplePictures:
    """Writes pictures every `validation_steps`, with the averaged weights where there are any."""

    def __init__(self, task: Task, config: Config, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator

    def __call__(self, step: int, metrics: StepMetrics) -> None:
        if step % self.config.validation.validation_steps == 0:
            self.sample(step)

    def sample(self, step: int) -> None:
        """Write the pictures of a step; those of step 0 show what was there before."""
        is_main = self.accelerator.is_main_process
        if not (is_main or self.task.needs_all_processes):
            return
        folder = self.config.output_dir / SAMPLES / step_name(step)
        with averaged_weights(self.task), warn_on_error("sampling"):
            self.task.sample(folder)
        if is_main and (folder / GRID_NAME).exists():
            with warn_on_error("the tracker"):
                log_pictures(self.accelerator, folder, step)


class SaveCheckpoints:
    """Save the state every so many steps or minutes, at the end, and when the run is to stop.

    Processes agree on minutes and signals after each step, so that all stop after the same one.
    """

    def __init__(
        self, task: Task, config: Config, processes: ProcessGroup, state: RunState
    ) -> None:
        self.task, self.config, self.processes, self.state = task, config, processes, state
        self.last_saved = time.monotonic()
        stop_request.bind()
        stop_request.waits_for_step = state.step < config.train.max_train_steps

    def __call__(self, step: int, metrics: StepMetrics) -> StopReason | None:
        settings, is_last = self.config.checkpoint, step == self.config.train.max_train_steps
        is_late = (
            settings.every_minutes is not None
            and time.monotonic() - self.last_saved > 60 * settings.every_minutes
        )
        number, is_late = self.processes.all_max(stop_request.signal_number, is_late)
        if step % settings.checkpointing_steps == 0 or is_last or is_late or number:
            # after a skipped step the older ones may be needed yet
            self.save(step, prune=not metrics["skipped"])
            stop_request.waits_for_step = not is_last
            # a signal that came while this one was saved has its checkpoint already
            (number,) = self.processes.all_max(stop_request.signal_number)
        return StopReason(signal.strsignal(number) or "signal", step, number) if number else None

    def save(self, step: int, prune: bool = True) -> None:
        state = replace(self.state, step=step)
        save_checkpoint(self.config, self.task, self.processes.accelerator, state, prune)
        self.last_saved = time.monotonic()

    def save_end(self, reason: StopReason) -> StopReason:
        """Save that the training is over: a run that is resumed does not train on.

        Returns the reason, with the number of a signal that came at the same step.
        """
        self.state = replace(self.state, end=reason.message)
        self.save(reason.step)
        stop_request.waits_for_step = False
        (number,) = self.processes.all_max(stop_request.signal_number)
        return replace(reason, signal_number=number)


def log_pictures(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Hand the grid in a folder of samples to each tracker that takes pictures."""
    for tracker in accelerator.trackers:
        if log_picture := PICTURE_LOGGERS.get(tracker.name):
            with Image.open(folder / GRID_NAME) as picture:
                log_picture(tracker, np.asarray(picture.convert("RGB")), step)


def log_to_tensorboard(tracker: GeneralTracker, picture: np.ndarray, step: int) -> None:
    tracker.log_images({PICTURE_LABEL: picture[None]}, step=step, dataformats="NHWC")


def log_to_wandb(tracker: GeneralTracker, picture: np.ndarray, step: int) -> None:
    tracker.log_images({PICTURE_LABEL: picture[None]}, step=step)


def log_to_trackio(tracker: GeneralTracker, picture: np.ndarray, step: int) -> None:
    """accelerate's tracker for trackio takes no pictures, but logs whatever trackio can store."""
    trackio = import_module("trackio")
    tracker.log({PICTURE_LABEL: trackio.Image(picture)}, step=step)


PICTURE_LABEL = "samples"
# By tracker: how it takes a picture (H, W, 3) uint8.
PICTURE_LOGGERS: dict[str, Callable[[GeneralTracker, np.ndarray, int], None]] = {
    "tensorboard": log_to_tensorboard,
    "wandb": log_to_wandb,
    "trackio": log_to_trackio,
}
