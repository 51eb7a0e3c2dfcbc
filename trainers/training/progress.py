"""The progress of a training: a bar on a terminal, a line for each log interval elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from tqdm import tqdm

from trainers.config.validation_metrics import DIRECTIONS, HELD_OUT_LOSS, HELD_OUT_LOSSES
from trainers.progress import bar_width, format_seconds, is_terminal, write_line

MAX_FIGURES = 2  # of a validation, beside the losses


class Progress(Protocol):
    def step(self) -> None:
        """A step more is done; nothing is read from the device."""

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a log interval that ends with `step`."""

    def close(self) -> None: ...


class BarProgress:
    """A bar that moves with each step, with the values of the newest log interval."""

    def __init__(self, total: int, start: int) -> None:
        self.bar = tqdm(total=total, initial=start, unit="step", **bar_width())

    def step(self) -> None:
        self.bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        self.bar.set_postfix_str(describe(values))

    def close(self) -> None:
        self.bar.close()


class LineProgress:
    """A line with the time of day for each log interval."""

    def __init__(self, total: int, start: int) -> None:
        self.total, self.start = total, start
        self.started_at = time.monotonic()

    def step(self) -> None:
        """A line tells of many steps."""

    def report(self, step: int, values: Mapping[str, float]) -> None:
        seconds_per_step = (time.monotonic() - self.started_at) / (step - self.start)
        left = format_seconds(seconds_per_step * (self.total - step))
        rate = f"{1 / seconds_per_step:.3g} steps/s" if seconds_per_step else ""
        write_line(f"step {step}/{self.total}  {describe(values)}  {rate}  {left} left")

    def close(self) -> None:
        """Every line is complete."""


class NoProgress:
    """For the processes that leave the telling to the main one."""

    def step(self) -> None: ...

    def report(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_progress(total: int, start: int, is_main: bool) -> Progress:
    if not is_main:
        return NoProgress()
    return BarProgress(total, start) if is_terminal() else LineProgress(total, start)


def describe(values: Mapping[str, float]) -> str:
    """The losses, the learning rate, the speed and the memory of a log interval."""
    texts = [f"{name} {value:.4f}" for name, value in name_losses(values).items()]
    figures = [name for name in DIRECTIONS if name in values and name not in HELD_OUT_LOSSES]
    for name in figures[:MAX_FIGURES]:
        shown = name.replace("held_out_", "held-out ").replace("_", " ")
        texts.append(f"{shown} {values[name]:.4g}")
    texts.append(f"lr {values['learning_rate']:.1e}")
    texts.append(f"{values['images_per_second']:.1f} images/s")
    texts.append(f"{values['peak_memory_gib']:.1f} GiB")
    return "  ".join(texts)


def name_losses(values: Mapping[str, float]) -> dict[str, float]:
    """The losses as people read them: that of a single player is the loss."""
    names = [name for name in values if name.endswith("_loss") and name != HELD_OUT_LOSS]
    named = {}
    for name in names:
        named["loss" if len(names) == 1 else name.removesuffix("_loss")] = values[name]
    if HELD_OUT_LOSS in values:
        named["held-out loss"] = values[HELD_OUT_LOSS]
    return named
