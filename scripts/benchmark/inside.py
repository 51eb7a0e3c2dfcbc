"""Steps of true size in one process, with weights drawn on the device and nothing written: ours and
a plain PEFT step.

python scripts/benchmark/inside.py [--size true] [--steps 15] [CELL ...]     (a line of JSON for
each cell)
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark import bases, check
from benchmark.bases import SIZES, Size
from trainers.config import loading
from trainers.data.rng import SampleRng
from trainers.data.sampler import BatchSlice
from trainers.dreambooth import DreamBooth
from trainers.efficiency.apply import open_family
from trainers.training.loop import train

WARM_UP = 5
# name: family, pixels (0: as the size has), pictures, options of ours, whether the plain step runs
# too
CELLS = {
    "sd15-512-bs1": ("sd15", 0, 1, [], True),
    "sd15-512-bs4": ("sd15", 0, 4, [], True),
    "sd3-1024-bs1": ("sd3", 0, 1, [], True),
    "flux-512-bs1": ("flux", 512, 1, [], True),
    "flux-1024-bs1-checkpointing": ("flux", 0, 1, ["train.gradient_checkpointing=true"], True),
    "flux-1024-bs1-selective": ("flux", 0, 1, ["train.gradient_checkpointing=selective"], False),
    "flux-1024-bs1": ("flux", 0, 1, [], True),
    "sd3-1024-bs1-modulation_cache": ("sd3", 0, 1, ["model.modulation_cache=true"], False),
    "flux-1024-bs1-checkpointing-modulation_cache": (
        "flux",
        0,
        1,
        ["train.gradient_checkpointing=true", "model.modulation_cache=true"],
        False,
    ),
    "sd3-1024-bs4": ("sd3", 0, 4, [], True),
    "sd3-1024-bs1-compile": ("sd3", 0, 1, ["train.compile=true"], False),
    "flux-512-bs1-compile": ("flux", 512, 1, ["train.compile=true"], False),
}


def make_denoiser(family: str, size: Size, device: torch.device) -> nn.Module:
    """Of random weights in bfloat16."""
    with torch.device("meta"):
        parts = bases.make_parts(family, size)
    skeleton, default = parts.get("unet") or parts["transformer"], torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return type(skeleton).from_config(skeleton.config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def condition(family: str, size: Size, rows: int, device: torch.device) -> dict[str, Tensor]:
    """What the text encoders would give."""
    if family == "sd15":
        shapes = {"encoder_hidden_states": (rows, 77, size.clip[0])}
    else:
        words = size.t5_tokens + (77 if family == "sd3" else 0)
        pooled = size.clip[0] + (size.clip_2[0] if family == "sd3" else 0)
        shapes = {
            "encoder_hidden_states": (rows, words, size.t5[0]),
            "pooled_projections": (rows, pooled),
        }
    return {
        name: torch.randn(shape, device=device, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }


def latent_shape(family: str, size: Size) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents."""
    side = size.resolution // 8
    return 4 if family == "sd15" else 16, side, side


class OneBatch:
    """The same micro-batch at each step, with the draws of that step."""

    encoder = SimpleNamespace(trained_encoders=())

    def __init__(self, batch: dict, share: BatchSlice, device: torch.device) -> None:
        self.batch, self.batch_slice, self.device = batch, share, device

    def __call__(self, step: int) -> Iterator[tuple[dict, SampleRng]]:
        (rows,) = self.batch_slice.micro_batches()
        yield (
            self.batch,
            SampleRng(
                self.batch_slice.seed, step, rows, self.device, self.batch_slice.global_batch_size
            ),
        )


class Clock:
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
        """Of each step after the first ones."""
        pairs = itertools.pairwise(self.marks[WARM_UP:])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]


def ours(
    name: str, size: Size, rows: int, options: list[str], base: Path, steps: int
) -> list[float]:
    """The task of DreamBooth in the loop."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    settings = loading.load_config(
        "configs/quickstart.yaml",
        [
            f"model.family={name}",
            f"model.pretrained_model_name_or_path={base}",
            "data.class_prompt=null",
            "data.num_class_images=0",
            f"data.resolution={size.resolution}",
            f"train.train_batch_size={rows}",
            "lora.rank=16",
            f"train.max_train_steps={WARM_UP + steps}",
            "lora.target_modules=" + json.dumps(check.TARGETS[name]),
            "optimizer.lr_warmup_steps=0",
            "optimizer.lr_scheduler=constant",
            *options,
        ],
    )
    family = open_family(settings.model, accelerator.device, torch.bfloat16)
    family.load()
    denoiser = make_denoiser(name, size, accelerator.device)
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    family.condition = lambda text: text
    channels, height, width = latent_shape(name, size)
    batch = {
        "moments": torch.randn(rows, 2 * channels, height, width, device=accelerator.device),
        "text": condition(name, size, rows, accelerator.device),
        "weight": torch.full((rows,), 1 / rows, device=accelerator.device),
    }
    batches = OneBatch(batch, BatchSlice(0, rows), accelerator.device)
    task = DreamBooth(family, batches, None, settings, accelerator)
    clock = Clock(accelerator.device)
    train(task, batches, settings.train, 0, accelerator, lambda step: 1.0, [clock])
    return clock.milliseconds()


def plain(name: str, size: Size, rows: int, options: list[str], steps: int) -> list[float]:
    """As the scripts of diffusers do it, the encoders' work left out: PEFT's layers, autocast,
    PyTorch's AdamW."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = make_denoiser(name, size, device).train()
    check.add_lora(denoiser, name, 16)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if "train.gradient_checkpointing=true" in options:
        denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    text = list(condition(name, size, rows, device).values())
    x0 = torch.randn(rows, *latent_shape(name, size), device=device)
    pipe = SimpleNamespace(scheduler=bases.make_sd15(SIZES["sd15"]["tiny"])["scheduler"])
    clock = Clock(device)
    for _ in range(WARM_UP + steps):
        eps = torch.randn_like(x0)
        t = (
            torch.randint(0, 1000, (rows,), device=device)
            if name == "sd15"
            else torch.rand(rows, device=device)
        )
        with torch.autocast(device.type, torch.bfloat16):
            output, target = check.predict(pipe, denoiser, name, x0, eps, t, text, torch.bfloat16)
        F.mse_loss(output.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock()
    return clock.milliseconds()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", default=list(CELLS))
    parser.add_argument("--size", choices=("tiny", "mid", "true"), default="true")
    parser.add_argument("--steps", type=int, default=15)
    arguments, failed = parser.parse_args(), False
    with TemporaryDirectory() as folder:
        for cell in arguments.cells:
            name, pixels, rows, options, both = CELLS[cell]
            size = SIZES[name][arguments.size]
            if pixels and arguments.size == "true":
                size = Size(**(vars(size) | {"resolution": pixels}))
            base = Path(folder) / name
            if not base.exists():
                bases.make_base(name, "tiny", base, torch.device("cpu"))
            for who in ("ours", "plain") if both else ("ours",):
                clear_device_cache(garbage_collection=True)
                row = {"cell": cell, "who": who}
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                    # what an earlier cell did not let go would count as this one's
                    row["held_before_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
                try:
                    args = (name, size, rows, options)
                    if who == "ours":
                        lengths = ours(*args, base, arguments.steps)
                    else:
                        lengths = plain(*args, arguments.steps)
                    milliseconds = statistics.median(lengths)
                    row |= {
                        "ms": round(milliseconds, 1),
                        "least": round(min(lengths), 1),
                        "most": round(max(lengths), 1),
                        "images_per_s": round(1000 * rows / milliseconds, 2),
                    }
                # one cell, such as one that does not fit, must not end the others
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                    failed = failed or not isinstance(error, torch.OutOfMemoryError)
                if torch.cuda.is_available():
                    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
