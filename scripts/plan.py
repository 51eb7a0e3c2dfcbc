"""How much memory a DreamBooth run takes under each preset of train.memory, and which fits first.

python scripts/plan.py configs/NAME.yaml [section.key=value ...] [--memory GIB] [--precision bf16]

It reads the configs of the base model, none of its weights and no photos. A preset leaves what the
config sets itself as it is. The seconds are the least that a step can take: its multiplications at
the rate of a large matrix product on this machine, or at --tflops.

Without --memory it also recommends settings for cards of 8 to 80 GB. Plans are kept in
~/.cache/diffusion-trainers: the first time takes minutes for a large base, and then seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import psutil

from trainers.cli import (
    add_config_arguments,
    make_parser,
    parse_config_arguments,
    run_main,
    silence_libraries,
)
from trainers.config import DreamBoothConfig
from trainers.config.dreambooth import MEMORY_PRESETS
from trainers.config.loading import load_config
from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.memory_advice import Advice, Planner

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
RESOLUTIONS = (512, 1024)
CALIBRATION = (
    "Planned steps took 0.96 to 1.05 of what steps on one H200 took, after a correction "
    "(docs/performance.md).\nWhole runs, quantized bases, what the allocator keeps beyond its "
    "tensors and smaller cards are not calibrated on a GPU."
)
HEADINGS = ("memory", "peak GiB", "of it", "TFLOP per step", "seconds at least", "fits")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config_arguments(parser)
    help = "GiB that the run must fit in. By default, what is free on this machine."
    parser.add_argument("--memory", type=float, help=help)
    help = "As accelerate's --mixed_precision. By default what the run would take."
    parser.add_argument("--precision", choices=DTYPES, help=help)
    help = "What the accelerator reaches. By default it is measured on this machine."
    parser.add_argument("--tflops", type=float, help=help)
    return parse_config_arguments(parser)


def main() -> None:
    arguments = parse_arguments()
    configs = load_presets(arguments.config, arguments.overrides)
    silence_libraries()
    import torch

    from trainers.distributed.accelerator import best_device
    from trainers.memory_advice import PlanCache, Planner
    from trainers.memory_plan import matmul_rate

    device = best_device()
    has_gpu = device.type != "cpu" or arguments.memory is not None
    precision = arguments.precision or choose_precision(configs, arguments.memory is not None)
    dtype = getattr(torch, DTYPES[precision])
    available_gib = arguments.memory or free_gib(device)
    rate = arguments.tflops * 1e12 if arguments.tflops else matmul_rate(device, dtype)
    print(f"{available_gib:.1f} GiB, {dtype}, {rate / 1e12:.2f} TFLOP/s")
    print_row(HEADINGS)
    print_row(["---"] * len(HEADINGS))
    fitting = None
    planner = Planner(dtype, has_gpu, PlanCache())
    for name, config in configs.items():
        plan = planner.plan(config)
        peak = plan.peak_bytes / 2**30
        flops = plan.flops * config.train.gradient_accumulation_steps
        phases = ", ".join(f"{phase} {size / 2**30:.2f}" for phase, size in plan.phases.items())
        numbers = (f"{peak:.2f}", phases, f"{flops / 1e12:.2f}", f"{flops / rate:.2f}")
        print_row([name, *numbers, peak < available_gib])
        if fitting is None and peak < available_gib:
            fitting = name
    fits_none = "none of them fits: see also accelerate_configs/fsdp2.yaml"
    print(f"train.memory={fitting}" if fitting else fits_none)
    if arguments.memory is None:
        # for cards, whatever this machine has
        precision = arguments.precision or choose_precision(configs, on_card=True)
        planner = Planner(getattr(torch, DTYPES[precision]), True, PlanCache())
        print_advice(planner, arguments.config, arguments.overrides)


def choose_precision(configs: Mapping[str, DreamBoothConfig], on_card: bool) -> str:
    """As accelerate will call it: the launcher's, the config's, or the best of the device.

    on_card: whether the plan is for a card that need not be here, which is taken to have bf16.
    """
    from trainers.distributed.accelerator import choose_mixed_precision

    # a preset sets no precision
    config = next(iter(configs.values()))
    if on_card and config.train.mixed_precision == "auto":
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"mixed_precision": "bf16"})}
        )
    return choose_mixed_precision(config, os.environ)


def print_advice(planner: Planner, path: str, overrides: list[str]) -> None:
    """A table of what fits on cards, for the config's resolution and the usual ones."""
    from trainers.memory_advice import CARDS, MARGIN, advise

    own = load_config(path, overrides, needs_pictures=False).data.max_resolution
    sides = sorted({own, *RESOLUTIONS} if own >= min(RESOLUTIONS) else {own})
    print(f"\nOn a card, {MARGIN:.0%} of it left free, in {planner.dtype}:\n")
    print_row(["card", *(f"data.resolution={side}" for side in sides)])
    print_row(["---"] * (len(sides) + 1))
    advice = {side: advise(planner, candidates(path, overrides, side)) for side in sides}
    for gib in CARDS:
        print_row([f"{gib} GB", *(describe(advice[side][gib]) for side in sides)])
    print(CALIBRATION)


def candidates(path: str, overrides: list[str], side: int) -> list:
    """The levels that the config can have, and what it is with each."""
    from trainers.memory_advice import LEVELS, PLAIN

    found, error = [], None
    for level in LEVELS:
        settings = {f"model.{key}": value for key, value in PLAIN.items()} | level
        own = {"data.resolution": side, "train.train_batch_size": 1, "train.memory": None}
        values = settings | own
        options = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        try:
            config = load_config(path, [*overrides, *options], needs_pictures=False)
        except UserError as reason:
            error = error or reason
        else:
            found.append((level, config))
    if not found:
        raise error
    return found


def describe(advice: Advice | None) -> str:
    """The settings as they are typed, and what they take."""
    if advice is None:
        return "nothing"
    values = {**advice.level, "train.train_batch_size": advice.batch_size}
    words = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    return f"{words.replace(chr(34), '')} ({advice.peak / 2**30:.1f} GiB)"


def load_presets(path: str, overrides: list[str]) -> dict[str, DreamBoothConfig]:
    """The different configs that the presets of train.memory make of one, by the first's name.

    A preset that the config cannot be combined with is named and left out. Raises: UserError when
    that is true of all of them, or when this is no DreamBooth run.
    """
    configs, errors, same = {}, {}, []
    for name in MEMORY_PRESETS:
        options = [*overrides, f"train.memory={name}"]
        try:
            config = load_config(path, options, needs_pictures=False)
        except UserError as error:
            errors[name] = error
            continue
        if any(settings(config) == settings(other) for other in configs.values()):
            same.append(name)
        else:
            configs[name] = config
    if not configs:
        # what is wrong without any preset comes before what is wrong with them
        kind = load_config(path, overrides, needs_pictures=False).kind
        if kind != "dreambooth":
            raise UserError(f"{path} is a run of {kind}: only DreamBooth runs have a plan")
        raise next(iter(errors.values()))
    for name, error in errors.items():
        print(f"train.memory={name} is left out. {error}")
    if same:
        print(f"{', '.join(same)}: no different here, because the config sets the same keys itself")
    return configs


def settings(config: DreamBoothConfig) -> str:
    """What the run depends on, whatever the preset is called."""
    return config.model_dump_json(exclude={"train": {"memory"}})


def print_row(cells: Iterable) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def free_gib(device) -> float:
    """What is free in the accelerator's memory, or in the CPU's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    return psutil.virtual_memory().available / 2**30


if __name__ == "__main__":
    sys.exit(run_main(main))
