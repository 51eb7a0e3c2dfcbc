"""One arm as a process of its own, started as users do, and the metrics of what it did."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from benchmark.arms import Arm
from benchmark.report import num_threads
from trainers.errors import RunFailedError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SECONDS_ALLOWED = 3600


@dataclass
class Launcher:
    """How arms are started; their logs are written to `folder`, and run folders removed there."""

    folder: Path
    device: str
    precision: str
    keeps_run: bool = False  # the last one's folder

    def run(self, arm: Arm) -> dict:
        """The record of `clock.py`, when the process was launched and ended, and its peak memory.

        Memory is counted together with that of its children. Raises: RunFailedError.
        """
        run, clock = self.folder / "run", self.folder / "clock.json"
        log = self.folder / f"{arm.name.replace(' ', '-')}.log"
        shutil.rmtree(run, ignore_errors=True)
        clock.unlink(missing_ok=True)
        launched = time.time()
        with open(log, "w") as file:
            process = subprocess.Popen(
                self.command(arm, run),
                cwd=ROOT,
                env=make_environment(arm, clock),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            peak = watch(process, launched + SECONDS_ALLOWED)
        ended = time.time()
        if not self.keeps_run:
            shutil.rmtree(run, ignore_errors=True)
        if process.returncode or not clock.exists():
            end = log.read_text()[-1500:]
            raise RunFailedError(
                f"{arm.name} failed, status {process.returncode}; {log} ends:\n{end}"
            )
        record = json.loads(clock.read_text())
        times = {"launched": launched, "ended": ended}
        return record | times | {"peak_rss": max(peak, record["peak_rss"])}

    def command(self, arm: Arm, run: Path) -> list[str]:
        """What `accelerate launch` is called with, for the run folder `run`."""
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
        command.append(f"--mixed_precision={self.precision}")
        command.append(f"--num_cpu_threads_per_process={num_threads()}")
        if self.device == "cpu":
            command.append("--cpu")
        command += [str(HERE / "clock.py"), str(arm.script), *arm.arguments]
        if arm.script.name == "train.py":
            command.append(f"output_dir={run}")
        elif arm.name != "check":
            command.append(f"--output_dir={run}")
        return command


def make_environment(arm: Arm, clock: Path) -> dict[str, str]:
    paths = [path for path in (arm.path, os.environ.get("PYTHONPATH", "")) if path]
    added = {"HF_HUB_OFFLINE": "1", "BENCHMARK_CLOCK": str(clock)}
    return os.environ | added | {"PYTHONPATH": os.pathsep.join(paths)}


def watch(process: subprocess.Popen, deadline: float) -> int:
    """Wait for the end of a process, or end it at the deadline; its peak memory in bytes."""
    peak = 0
    try:
        while process.poll() is None and time.time() < deadline:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
    return peak


def resident_bytes(pid: int) -> int:
    """Bytes of all processes below the launcher's."""
    total = 0
    try:
        for child in psutil.Process(pid).children(recursive=True):
            total += child.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


@dataclass
class Metrics:
    """What the records of a case become: metrics by the names of `report.METRIC_NAMES`."""

    num_steps: int
    batch: int
    device: str
    flops: float  # of one picture's LoRA step
    peak_flops: float  # FLOP/s that MFU is a share of

    def __call__(self, record: dict) -> dict[str, float]:
        """Steady are the steps after the first ten, or after the first third.

        Raises: RunFailedError when other steps were seen than asked for.
        """
        steps, launched = record["steps"], record["launched"]
        if len(steps) != self.num_steps:
            raise RunFailedError(f"{len(steps)} optimizer steps were seen, not {self.num_steps}")
        first = min(10, (len(steps) - 1) // 3)
        steady = median_difference(steps[first:])
        # where fewer were made, the rest is extrapolated
        wanted = -(-100 // self.batch)
        hundredth = steps[min(wanted, len(steps)) - 1] + max(0, wanted - len(steps)) * steady
        row = {
            "loaded": record["ready"] - launched,
            "first": steps[0] - launched,
            "step": 1000 * steady,
            "cpu": 1000 * median_difference(record["cpu"][first:]),
            "rate": self.batch / steady,
            "hundred": hundredth - launched,
            "whole": record["ended"] - launched,
            "memory": record["peak_rss"] / 2**30,
            "mfu": 100 * self.batch * self.flops / steady / self.peak_flops,
            "peak_rss": record["peak_rss"] / 2**30,
        }
        if self.device == "cuda":
            row["memory"] = record["peak_allocated"] / 2**30
            row["peak_reserved"] = record["peak_reserved"] / 2**30
        return {name: round(value, 3) for name, value in row.items()}


def median_difference(values: list[float]) -> float:
    return statistics.median(after - before for before, after in pairwise(values))
