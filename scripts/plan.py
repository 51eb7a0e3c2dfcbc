"""How much memory a DreamBooth run takes under each preset of train.memory, and which fits first.

python scripts/plan.py configs/NAME.yaml [section.key=value ...] [--memory GIB] [--precision bf16]

It reads the configs of the base model, none of its weights and no photos. A preset leaves what the
config sets itself as it is. The seconds are the least that a step can take: its multiplications at
the rate of a large matrix product on this machine, or at --tflops.
"""

import argparse
import sys
from collections.abc import Iterable

import psutil

from trainers.cli import add_config_arguments, make_parser, run_main, silence_libraries
from trainers.config import DreamBoothConfig
from trainers.config.dreambooth import MEMORY_PRESETS
from trainers.config.loading import load_config
from trainers.errors import UserError

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
HEADINGS = ("memory", "peak GiB", "of it", "TFLOP per step", "seconds at least", "fits")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_config_arguments(parser)
    help = "GiB that the run must fit in. By default, what is free on this machine."
    parser.add_argument("--memory", type=float, help=help)
    help = "As accelerate's --mixed_precision. By default bf16, and no on a CPU."
    parser.add_argument("--precision", choices=DTYPES, help=help)
    help = "What the accelerator reaches. By default it is measured on this machine."
    parser.add_argument("--tflops", type=float, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    configs = load_presets(arguments.config, arguments.overrides)
    silence_libraries()
    import torch

    from trainers.distributed.accelerator import best_device
    from trainers.memory_plan import matmul_rate, plan_memory

    device = best_device()
    has_gpu = device.type != "cpu" or arguments.memory is not None
    dtype = getattr(torch, DTYPES[arguments.precision or ("bf16" if has_gpu else "no")])
    available_gib = arguments.memory or free_gib(device)
    rate = arguments.tflops * 1e12 if arguments.tflops else matmul_rate(device, dtype)
    print(f"{available_gib:.1f} GiB, {dtype}, {rate / 1e12:.2f} TFLOP/s")
    print_row(HEADINGS)
    print_row(["---"] * len(HEADINGS))
    fitting = None
    for name, config in configs.items():
        plan = plan_memory(config, dtype, has_gpu)
        peak = plan.peak_bytes / 2**30
        flops = plan.flops * config.train.gradient_accumulation_steps
        phases = ", ".join(f"{phase} {size / 2**30:.2f}" for phase, size in plan.phases.items())
        numbers = (f"{peak:.2f}", phases, f"{flops / 1e12:.2f}", f"{flops / rate:.2f}")
        print_row([name, *numbers, peak < available_gib])
        if fitting is None and peak < available_gib:
            fitting = name
    fits_none = "none of them fits: see also accelerate_configs/fsdp2.yaml"
    print(f"train.memory={fitting}" if fitting else fits_none)


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
