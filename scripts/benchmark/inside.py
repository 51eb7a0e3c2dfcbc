"""Time cells in one process: our step and that of diffusers' example scripts, in turns.

Weights are drawn on the device, latents and prompts are random numbers, and nothing of it is on a
disk. First the parity gate, at a size at which there is room for float32; then a line of JSON for
each cell as soon as it is done, so that a run that is cut off keeps the others.

Both arms of a cell are in memory together and take turns, round after round; where they do not fit,
each is made anew for each of its turns. The peak of an arm is that of its first steps, without what
was held before it was made.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache

from benchmark.cells import CELLS, CHECKPOINTED, Cell
from benchmark.flops import step_flops
from benchmark.in_memory import Place, gate, make_place, make_task
from benchmark.report import machine
from benchmark.sizes import RANK, SIZES, TARGETS, Size
from reference.script_step import ScriptStep
from trainers.cli import silence_libraries
from trainers.efficiency.attention import attention_kernel
from trainers.efficiency.backends import training_backends
from trainers.errors import UserError
from trainers.memory_plan import matmul_rate
from trainers.training.loop import train

WARM_UP = 3  # steps
ROUNDS = 3


class StepTimer:
    """Marks the ends of steps, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda, self.marks = device.type == "cuda", []

    def __call__(self, *_: object) -> None:
        if self.is_cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """From the end of each step to that of the next."""
        if self.is_cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairwise(self.marks)]
        return [1000 * (after - before) for before, after in pairwise(self.marks)]


class Arm(Protocol):
    def run(self, steps: int, mark: Callable[..., None]) -> None:
        """Train some steps more, with a mark after each."""


class Ours:
    """DreamBooth's task in the product's loop, without its log."""

    def __init__(self, cell: Cell, size: Size, place: Place) -> None:
        self.task, self.batches = make_task(cell, size, place, place.accelerator())
        self.done = 0

    def run(self, steps: int, mark: Callable[..., None]) -> None:
        config = self.task.config.train.model_copy(update={"max_train_steps": self.done + steps})
        accelerator, start = self.task.accelerator, self.done
        kernel = attention_kernel(self.task.attention, accelerator.device)
        with kernel, training_backends(accelerator):
            train(self.task, self.batches, config, 0, accelerator, lambda _: 1.0, [mark], start)
        self.done += steps


class Scripts:
    """The step of the example scripts of diffusers, with the layers and the rank of ours."""

    def __init__(self, cell: Cell, size: Size, place: Place) -> None:
        batch = place.batch(cell, size)
        self.step = ScriptStep(
            cell.family,
            place.denoiser(cell.family, size),
            (RANK, TARGETS[cell.family]),
            batch["moments"].chunk(2, dim=1)[0],
            list(batch["text"].values()),
            place.scheduler(cell.family),
            place.accelerator(),
            has_checkpointing=CHECKPOINTED in cell.options,
        )

    def run(self, steps: int, mark: Callable[..., None]) -> None:
        # as their --allow_tf32
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            for _ in range(steps):
                self.step()
                mark()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


ARMS: dict[str, Callable[[Cell, Size, Place], Arm]] = {"ours": Ours, "scripts": Scripts}


@dataclass
class Measured:
    """What the turns of an arm have shown: milliseconds of steps, bytes at the peak."""

    rounds: list[list[float]] = field(default_factory=list)
    peak: int = 0
    reserved: int = 0  # of the allocator, what the arm has used and what lies between
    held_before: int = 0

    def row(self, rows: int, flops: float, rate: float) -> dict[str, Any]:
        """Medians over all steps. flops: of one picture; rate: FLOP/s that MFU is a share of."""
        lengths = list(chain(*self.rounds))
        milliseconds = statistics.median(lengths)
        found = {
            "ms": round(milliseconds, 2),
            "least": round(min(lengths), 2),
            "most": round(max(lengths), 2),
            "rounds": [round(statistics.median(lengths), 2) for lengths in self.rounds],
            "images_per_s": round(1000 * rows / milliseconds, 2),
            "mfu_percent": round(100 * rows * flops / (milliseconds / 1000) / rate, 2),
        }
        if self.peak:
            found["peak_gib"] = round(self.peak / 2**30, 2)
            found["reserved_gib"] = round(self.reserved / 2**30, 2)
            found["held_before_gib"] = round(self.held_before / 2**30, 2)
        return found


@dataclass
class Bench:
    """How cells are timed: the place, the steps of a turn, and the rate of a matrix product."""

    place: Place
    steps: int
    rate: float

    def make(self, name: str, cell: Cell, size: Size, found: Measured) -> Arm:
        """An arm that has done its first steps, in which its peak is seen."""
        clear_device_cache(garbage_collection=True)
        is_cuda = self.place.device.type == "cuda"
        if is_cuda:
            found.held_before = torch.cuda.memory_allocated()
            reserved_before = torch.cuda.memory_reserved()
        arm = ARMS[name](cell, size, self.place)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        self.turn(arm, WARM_UP)
        if is_cuda:
            found.peak = torch.cuda.max_memory_allocated() - found.held_before
            found.reserved = torch.cuda.max_memory_reserved() - reserved_before
        return arm

    def turn(self, arm: Arm, steps: int) -> list[float]:
        """The milliseconds of all steps but the first."""
        timer = StepTimer(self.place.device)
        arm.run(steps, timer)
        return timer.milliseconds()

    def together(self, names: Sequence[str], cell: Cell, size: Size) -> dict[str, Measured]:
        """All arms in memory, in turns. Raises: torch.OutOfMemoryError."""
        found = {name: Measured() for name in names}
        arms = {name: self.make(name, cell, size, found[name]) for name in names}
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                found[name].rounds.append(self.turn(arm, self.steps + 1))
        return found

    def apart(self, names: Sequence[str], cell: Cell, size: Size) -> dict[str, Measured | str]:
        """Each arm made anew for its turn; what an arm failed by, where it does not fit alone."""
        found: dict[str, Measured | str] = {name: Measured() for name in names}
        for _ in range(ROUNDS):
            for name, measured in found.items():
                if isinstance(measured, str):
                    continue
                try:
                    arm = self.make(name, cell, size, measured)
                    measured.rounds.append(self.turn(arm, self.steps + 1))
                except torch.OutOfMemoryError as error:
                    found[name] = describe(error)
                arm = None
        return found

    def cell(self, name: str, size_name: str) -> tuple[dict[str, Any], bool]:
        """The line of a cell, and whether it failed for want of anything but memory."""
        cell = CELLS[name]
        size, names = cell.size(size_name), list(ARMS) if cell.has_scripts else ["ours"]
        line = {"cell": name, "size": size_name, "precision": self.place.precision}
        flops = step_flops(cell.family, size)
        line |= {"gflop_per_image": round(flops / 1e9, 2), "matmul_tflops": self.rate / 1e12}
        # one cell that fails must not end the others
        try:
            found, line["turns"] = self.measure(names, cell, size)
        except Exception as error:
            return line | {"error": describe(error)}, True
        for arm, measured in found.items():
            failed = isinstance(measured, str)
            row = {"error": measured} if failed else measured.row(cell.rows, flops, self.rate)
            line[arm] = row
        if all("ms" in line.get(arm, ()) for arm in ARMS):
            line["scripts / ours"] = round(line["scripts"]["ms"] / line["ours"]["ms"], 3)
        return line, False

    def measure(
        self, names: Sequence[str], cell: Cell, size: Size
    ) -> tuple[dict[str, Measured | str], str]:
        try:
            return self.together(names, cell, size), "together"
        except torch.OutOfMemoryError:
            pass
        # only now nothing holds what the failed ones had made
        gc.collect()
        return self.apart(names, cell, size), "apart"


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def outside_gib(device: torch.device) -> float | None:
    """GiB of the card in use outside of PyTorch's allocator: the context, and other processes."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return round((total - free - torch.cuda.memory_reserved()) / 2**30, 2)


def print_line(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def run_inside(arguments: Namespace) -> int:
    """Time the cells that were asked for. Returns 1 where a gate or a cell failed."""
    if unknown := [name for name in arguments.cells if name not in CELLS]:
        raise UserError(f"there is no cell {unknown[0]}; there are {', '.join(CELLS)}")
    silence_libraries()
    names = [name for name in arguments.cells or CELLS if CELLS[name].family in arguments.family]
    any_failed = False
    with TemporaryDirectory() as folder:
        place = make_place(arguments.precision, arguments.device, Path(folder))
        rate = matmul_rate(place.device, place.dtype)
        known = {"precision": place.precision, "matmul_tflops": rate / 1e12}
        known["outside_gib"] = outside_gib(place.device)
        print_line(machine(arguments.device) | known)
        bench = Bench(place, arguments.steps or 3, rate)
        for size in arguments.size:
            equal = {}
            for family in dict.fromkeys(CELLS[name].family for name in names):
                # of true size there is no room for float32
                gated = "mid" if size == "true" else size
                found = gate(family, SIZES[family][gated], place)
                print_line({"gate": family, "size": gated} | found)
                equal[family] = found["equal"]
            for name in (name for name in names if equal[CELLS[name].family]):
                line, has_failed = bench.cell(name, size)
                any_failed = any_failed or has_failed
                print_line(line)
            any_failed = any_failed or not all(equal.values())
    return int(any_failed)
