"""Time steps of true size in one process, ours and a plain PEFT step.

python scripts/benchmark/inside.py [--size true] [--steps 15] [CELL ...]

The weights are drawn on the device, and nothing is written. It prints a line of JSON for each cell.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DDPMScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import bases
from benchmark.sizes import RANK, SIZES, TARGETS, Size, condition_shapes, latent_shape
from reference import step
from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.data.sampler import BatchSlice
from trainers.dreambooth import DreamBooth
from trainers.efficiency.apply import open_family
from trainers.training.loop import train

WARM_UP = 5
CHECKPOINTED = "train.gradient_checkpointing=true"
MODULATION_CACHE = "model.modulation_cache=true"


@dataclass(frozen=True)
class Cell:
    family: str
    rows: int = 1  # pictures in a batch
    options: tuple[str, ...] = ()  # of ours
    has_plain: bool = True  # whether the plain step is timed too
    pixels: int | None = None  # instead of those of the true size


CELLS = {
    "sd15-512-bs1": Cell("sd15"),
    "sd15-512-bs4": Cell("sd15", rows=4),
    "sd3-1024-bs1": Cell("sd3"),
    "flux-512-bs1": Cell("flux", pixels=512),
    "flux-1024-bs1-checkpointing": Cell("flux", options=(CHECKPOINTED,)),
    "flux-1024-bs1-selective": Cell(
        "flux", options=("train.gradient_checkpointing=selective",), has_plain=False
    ),
    "flux-1024-bs1": Cell("flux"),
    "sd3-1024-bs1-modulation_cache": Cell("sd3", options=(MODULATION_CACHE,), has_plain=False),
    "flux-1024-bs1-checkpointing-modulation_cache": Cell(
        "flux", options=(CHECKPOINTED, MODULATION_CACHE), has_plain=False
    ),
    "sd3-1024-bs4": Cell("sd3", rows=4),
    "sd3-1024-bs1-compile": Cell("sd3", options=("train.compile=true",), has_plain=False),
    "flux-512-bs1-compile": Cell(
        "flux", options=("train.compile=true",), has_plain=False, pixels=512
    ),
}


def make_denoiser(family: str, size: Size, device: torch.device) -> nn.Module:
    """The family's denoiser with random weights in bfloat16."""
    with torch.device("meta"):
        parts = bases.make_parts(family, size)
    meta_model, default = parts.get("unet") or parts["transformer"], torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return type(meta_model).from_config(meta_model.config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def make_condition(family: str, size: Size, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Random numbers in place of what the text encoders give."""
    shapes = condition_shapes(family, size, rows).items()
    return {name: torch.randn(shape, device=device, dtype=torch.bfloat16) for name, shape in shapes}


class OneBatch:
    """The same micro-batch at each step, with the draws of that step."""

    encoder = SimpleNamespace(trained_encoders=())

    def __init__(self, batch: dict, batch_slice: BatchSlice, device: torch.device) -> None:
        self.batch, self.batch_slice, self.device = batch, batch_slice, device

    def __call__(self, step: int) -> Iterator[tuple[dict, SampleRng]]:
        (rows,) = self.batch_slice.micro_batches()
        size = self.batch_slice.global_batch_size
        yield self.batch, SampleRng(self.batch_slice.seed, step, rows, self.device, size)


class StepTimer:
    """Milliseconds between calls, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def __call__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """The length of each step after the first ones."""
        pairs = pairwise(self.marks[WARM_UP:])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]


def time_ours(cell: Cell, size: Size, base: Path, steps: int) -> list[float]:
    """Milliseconds of each step of DreamBooth's task in the loop."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    name, device = cell.family, accelerator.device
    options = [
        f"model.family={name}",
        f"model.pretrained_model_name_or_path={base}",
        "data.class_prompt=null",
        "data.num_class_images=0",
        f"data.resolution={size.resolution}",
        f"train.train_batch_size={cell.rows}",
        f"lora.rank={RANK}",
        f"train.max_train_steps={WARM_UP + steps}",
        f"lora.target_modules={json.dumps(TARGETS[name])}",
        "optimizer.lr_warmup_steps=0",
        "optimizer.lr_scheduler=constant",
        *cell.options,
    ]
    settings = loading.load_config("configs/quickstart.yaml", options)
    family = open_family(settings.model, device, torch.bfloat16)
    family.load()
    denoiser = make_denoiser(name, size, device)
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    family.condition = lambda text: text
    channels, height, width = latent_shape(name, size)
    batch = {
        "moments": torch.randn(cell.rows, 2 * channels, height, width, device=device),
        "text": make_condition(name, size, cell.rows, device),
        "weight": torch.full((cell.rows,), 1 / cell.rows, device=device),
    }
    batches = OneBatch(batch, BatchSlice(0, cell.rows), device)
    task = DreamBooth(family, batches, None, settings, accelerator)
    timer = StepTimer(device)
    train(task, batches, settings.train, 0, accelerator, lambda step: 1.0, [timer])
    return timer.milliseconds()


def time_plain(cell: Cell, size: Size, base: Path, steps: int) -> list[float]:
    """Milliseconds of each step as the scripts of diffusers do it, without the encoders' work.

    That is PEFT's layers, autocast and PyTorch's AdamW.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, rows = cell.family, cell.rows
    denoiser = make_denoiser(name, size, device).train()
    step.add_lora(denoiser, RANK, TARGETS[name])
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if CHECKPOINTED in cell.options:
        denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    text = list(make_condition(name, size, rows, device).values())
    x0 = torch.randn(rows, *latent_shape(name, size), device=device)
    scheduler = DDPMScheduler.load_config(base, subfolder="scheduler")
    timer = StepTimer(device)
    for _ in range(WARM_UP + steps):
        eps = torch.randn_like(x0)
        t = torch.rand(rows, device=device)
        if name == "sd15":
            t = (1000 * t).long()
        x_t, target = step.corrupt(name, scheduler, x0, eps, t)
        with torch.autocast(device.type, torch.bfloat16):
            output = step.call_denoiser(name, denoiser, x_t.bfloat16(), t, text)
        F.mse_loss(output.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        timer()
    return timer.milliseconds()


ARMS: dict[str, Callable[[Cell, Size, Path, int], list[float]]] = {
    "ours": time_ours,
    "plain": time_plain,
}


def measure(arm: str, cell: Cell, size: Size, base: Path, steps: int) -> tuple[dict, bool]:
    """The row of an arm in a cell, and whether it failed for want of anything but memory."""
    clear_device_cache(garbage_collection=True)
    row, has_failed = {"who": arm}, False
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        # what an earlier cell did not let go would count as this one's
        row["held_before_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    # one cell, such as one that does not fit, must not end the others
    try:
        lengths = ARMS[arm](cell, size, base, steps)
        milliseconds = statistics.median(lengths)
        row["ms"] = round(milliseconds, 1)
        row["least"] = round(min(lengths), 1)
        row["most"] = round(max(lengths), 1)
        row["images_per_s"] = round(1000 * cell.rows / milliseconds, 2)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
        has_failed = not isinstance(error, torch.OutOfMemoryError)
    if torch.cuda.is_available():
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row, has_failed


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = f"By default all of {', '.join(CELLS)}."
    parser.add_argument("cells", nargs="*", metavar="CELL", help=help)
    parser.add_argument("--size", choices=("tiny", "mid", "true"), default="true")
    help = f"Steps that are timed, after {WARM_UP} others."
    parser.add_argument("--steps", type=positive_int, default=15, help=help)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cells if name not in CELLS]:
        parser.error(f"there is no cell {unknown[0]}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    silence_libraries()
    any_failed = False
    with TemporaryDirectory() as folder:
        for name in arguments.cells or CELLS:
            cell = CELLS[name]
            size = SIZES[cell.family][arguments.size]
            if cell.pixels and arguments.size == "true":
                size = replace(size, resolution=cell.pixels)
            base = Path(folder) / cell.family
            if not base.exists():
                bases.make_base(cell.family, "tiny", base, torch.device("cpu"))
            for arm in ("ours", "plain") if cell.has_plain else ("ours",):
                row, has_failed = measure(arm, cell, size, base, arguments.steps)
                any_failed = any_failed or has_failed
                print(json.dumps({"cell": name} | row), flush=True)
    return int(any_failed)


if __name__ == "__main__":
    sys.exit(run_main(main))
