"""Our task on a denoiser with random weights, latents and prompts, none of them on a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn

from benchmark import bases
from benchmark.cells import Cell
from benchmark.parity import ALPHA, DTYPES, NUM_BATCHES, Reference, compare, make_inputs
from benchmark.sizes import RANK, TARGETS, Size, condition_shapes, latent_shape
from trainers.config import DreamBoothConfig, loading
from trainers.data.crops import GEOMETRY
from trainers.data.rng import SampleRng
from trainers.data.sampler import BatchSlice
from trainers.distributed.accelerator import best_device, complete_float16
from trainers.dreambooth import DreamBooth
from trainers.efficiency.apply import open_family

CONFIG = Path(__file__).resolve().parents[2] / "configs/quickstart.yaml"


class OneBatch:
    """The same micro-batch at each step, with the draws of that step."""

    encoder = SimpleNamespace(trained_encoders=())

    def __init__(self, batch: dict, batch_slice: BatchSlice, device: torch.device) -> None:
        self.batch, self.batch_slice, self.device = batch, batch_slice, device

    def __call__(self, step: int) -> Iterator[tuple[dict, SampleRng]]:
        (rows,) = self.batch_slice.micro_batches()
        size = self.batch_slice.global_batch_size
        yield self.batch, SampleRng(self.batch_slice.seed, step, rows, self.device, size)


@dataclass
class Place:
    """Where cells are computed: the device, the precision, and a folder for tiny bases.

    Of those bases only the configs and the scheduler are read.
    """

    device: torch.device
    precision: str
    folder: Path

    def accelerator(self) -> Accelerator:
        is_cpu = self.device.type == "cpu"
        accelerator = Accelerator(mixed_precision=self.precision, cpu=is_cpu)
        complete_float16(accelerator)
        return accelerator

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def base(self, family: str) -> Path:
        base = self.folder / family
        if not base.exists():
            bases.make_base(family, "tiny", base, torch.device("cpu"))
        return base

    def scheduler(self, family: str) -> dict[str, Any]:
        """The scheduler's config."""
        return DDPMScheduler.load_config(self.base(family), subfolder="scheduler")

    def denoiser(self, family: str, size: Size) -> nn.Module:
        """The denoiser with random weights, each time the same, in the precision of the base."""
        default = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return bases.new_denoiser(family, size).requires_grad_(False)
        finally:
            torch.set_default_dtype(default)

    def batch(self, cell: Cell, size: Size) -> dict[str, Any]:
        """A micro-batch of random moments and prompts, each time the same."""
        generator = torch.Generator(self.device).manual_seed(1)
        channels, height, width = latent_shape(cell.family, size)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        shapes = condition_shapes(cell.family, size, cell.rows).items()
        return {
            "moments": random(cell.rows, 2 * channels, height, width),
            "text": {name: random(*shape).to(self.dtype) for name, shape in shapes},
            "weight": torch.full((cell.rows,), 1 / cell.rows, device=self.device),
            GEOMETRY: torch.zeros(cell.rows, 6, dtype=torch.int64, device=self.device),
            "num_kept": 0,
        }


def condition_as_it_is(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the pictures' geometry, in place of `Family.condition`."""
    return {name: value for name, value in text.items() if name != GEOMETRY}


def make_place(precision: str | None, device: str, folder: Path) -> Place:
    """A place with bf16 on a GPU and float32 elsewhere, unless something else is asked for."""
    chosen = best_device() if device != "cpu" else torch.device("cpu")
    return Place(chosen, precision or ("no" if chosen.type == "cpu" else "bf16"), folder)


def make_settings(cell: Cell, size: Size, base: Path, *options: str) -> DreamBoothConfig:
    """The config of ours: the defaults, with the cell's options and those given."""
    values = [
        f"model.family={cell.family}",
        f"model.pretrained_model_name_or_path={base}",
        "data.class_prompt=null",
        "data.prior=none",
        f"data.resolution={size.resolution}",
        f"train.train_batch_size={cell.rows}",
        f"lora.rank={RANK}",
        f"lora.target_modules={json.dumps(TARGETS[cell.family])}",
        "optimizer.lr_warmup_steps=0",
        "optimizer.lr_scheduler=constant",
    ]
    return loading.load_config(CONFIG, [*values, *cell.options, *options], needs_pictures=False)


def make_task(
    cell: Cell, size: Size, place: Place, accelerator: Accelerator, *options: str
) -> tuple[DreamBooth, OneBatch]:
    """Our task, as `dreambooth.build` would make it of a base with these weights."""
    settings = make_settings(cell, size, place.base(cell.family), *options)
    family = open_family(settings.model, place.device, place.dtype)
    family.load()
    denoiser = place.denoiser(cell.family, size)
    family.pipe.register_modules(**{family.denoiser_name: denoiser})
    # the batch has what the text encoders would give, by the denoiser's names
    family.condition = condition_as_it_is
    batch_slice = BatchSlice(settings.seed, cell.rows)
    batches = OneBatch(place.batch(cell, size), batch_slice, place.device)
    return DreamBooth(family, batches, None, settings, accelerator), batches


def gate(family: str, size: Size, place: Place, rows: int = 2) -> dict[str, Any]:
    """What `parity.compare` finds out about our plain step at a size."""
    cell, accelerator = Cell(family, rows=rows), place.accelerator()
    task, batches = make_task(cell, size, place, accelerator, f"lora.alpha={ALPHA}")
    vae = AutoencoderKL.load_config(place.base(family), subfolder="vae")
    scheduler, inputs = place.scheduler(family), []
    for number in range(NUM_BATCHES):
        ((batch, rng),) = batches(number)
        text = list(batch["text"].values())
        inputs.append(make_inputs(task.config, batch["moments"], text, rng, vae, scheduler))
    reference = Reference(family, place.denoiser(family, size), scheduler, inputs)
    return compare(task, batches, reference, accelerator)
