"""What is done after a step, every so many steps: log, sample, checkpoint. Only here do values leave the device."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from trainers.config import Config
from trainers.distributed.collectives import Crew
from trainers.errors import Interrupted, tolerated
from trainers.run_folder import append, loads, write_whole
from trainers.training.checkpoint import State, save_checkpoint
from trainers.training.loop import Means, Task, averaged


class Log:
    """metrics.jsonl, the trackers and one progress line: step, losses, rate, images/s, time left, peak memory."""

    def __init__(self, config: Config, accelerator: Accelerator, rate: Callable[[int], float], start: int) -> None:
        self.config, self.accelerator, self.rate = config, accelerator, rate
        self.file = config.output_dir / "metrics.jsonl"
        train = config.train
        self.batch = train.train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
        self.unread: list[Means] = []
        self.since, self.last = start, time.perf_counter()
        shown = accelerator.is_main_process
        self.bar = tqdm(total=train.max_train_steps, initial=start, unit="step", disable=not shown, dynamic_ncols=True)
        if shown and self.file.exists():  # a killed run may have logged steps past its last checkpoint, or half a line
            kept = [line for line in self.file.read_text().splitlines() if loads(line).get("step", math.inf) <= start]
            write_whole(self.file, "".join(line + "\n" for line in kept))

    def __call__(self, step: int, means: Means) -> None:
        self.unread.append(means)
        if step % self.config.tracking.log_every and step != self.config.train.max_train_steps:
            return
        steps, now = step - self.since, time.perf_counter()
        sums, counts = (self.accelerator.reduce(part, "sum") for part in self.read())
        values = {name: (sums[name] / counts[name]).item() for name in sorted(sums) if counts[name]}
        if not values["skipped"]:
            del values["skipped"]
        values["learning_rate"] = self.config.optimizer.learning_rate * self.rate(step - 1)
        values["images_per_second"] = steps * self.batch / (now - self.last)
        values["peak_memory_gib"] = peak_memory()
        self.unread, self.since, self.last = [], step, now
        if self.accelerator.is_main_process:
            with tolerated("the tracker"):
                self.accelerator.log(values, step=step)
            with tolerated(f"writing {self.file}"):
                append(self.file, json.dumps({"step": step, **values}) + "\n")
        losses = "  ".join(f"{k.removesuffix('_loss')} {v:.4f}" for k, v in values.items() if k.endswith("_loss"))
        self.bar.set_postfix_str(
            f"{losses}  lr {values['learning_rate']:.1e}  {values['images_per_second']:.1f} images/s  "
            f"peak {values['peak_memory_gib']:.1f} GiB"
        )
        self.bar.update(steps)

    def read(self) -> tuple[Means, Means]:
        """Sums of what is finite, for a skipped step must not spoil the mean; and how many: a player may step less."""
        names = sorted({name for means in self.unread for name in means})  # the same order in every process
        every = {name: torch.stack([means[name] for means in self.unread if name in means]) for name in names}
        finite = {name: values.isfinite() for name, values in every.items()}
        return {n: v.where(finite[n], 0).sum() for n, v in every.items()}, {n: f.sum() for n, f in finite.items()}


def peak_memory() -> float:
    """GiB: the accelerator's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Sample:
    """Pictures of the validation prompts every `validation_steps`, with the averaged weights where there are any."""

    def __init__(self, task: Task, config: Config, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator

    def __call__(self, step: int, means: Means) -> None:
        main = self.accelerator.is_main_process
        if step % self.config.validation.validation_steps or not (main or self.task.joint):
            return
        folder = self.config.output_dir / "samples" / f"step-{step:06d}"
        with averaged(self.task), tolerated("sampling"):
            self.task.sample(folder)
        if main and (folder / "grid.png").exists():
            with tolerated("the tracker"):
                track_pictures(self.accelerator, folder, step)


class Checkpoint:
    """The state every so many steps or minutes, at the end, and when a signal asks the run to stop.

    Processes agree on minutes and signals after each step, so that all of them stop after the same one.
    """

    def __init__(self, task: Task, config: Config, crew: Crew, state: State) -> None:
        self.task, self.config, self.crew, self.state = task, config, crew, state
        self.signal, self.saved = 0, time.monotonic()
        self.done = state.step >= config.train.max_train_steps
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if name in signal.Signals.__members__:  # Windows has no SIGUSR1
                signal.signal(signal.Signals[name], self.stop)

    def stop(self, number: int, frame: object) -> None:
        if self.signal or self.done:  # a second signal does not wait, nor is there another step to wait for
            raise Interrupted(number)
        self.signal = number

    def __call__(self, step: int, means: Means) -> None:
        settings, last = self.config.checkpoint, step == self.config.train.max_train_steps
        late = settings.every_minutes is not None and time.monotonic() - self.saved > 60 * settings.every_minutes
        number, late = self.crew.agree(self.signal, late)
        if step % settings.checkpointing_steps == 0 or last or late or number:
            prune = not means["skipped"]  # else the older ones may be needed yet
            save_checkpoint(self.config, step, self.task, self.crew.accelerator, self.state, prune)
            self.saved = time.monotonic()
        if last:  # no later step would see a signal that came while this one was saved
            self.done = True
            (number,) = self.crew.agree(self.signal)
        if number:
            raise Interrupted(number)


def track_pictures(accelerator: Accelerator, folder: Path, step: int) -> None:
    layout = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}  # the trackers that take pictures
    for tracker in accelerator.trackers:
        if tracker.name in layout:
            picture = np.asarray(Image.open(folder / "grid.png"))
            tracker.log_images({"samples": picture[None]}, step=step, **layout[tracker.name])
