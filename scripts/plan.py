"""How much memory a DreamBooth config will take under each preset of train.memory, and which is the
first to fit.

python scripts/plan.py configs/NAME.yaml [section.key=value ...] [--memory GIB] [--precision bf16]
[--tflops N]

Reads the base's configs and no weights. What the config sets itself, no preset changes. Seconds are
the least that a step can take: its multiplications at the rate of a large matrix product here, or
at --tflops.
"""

import sys

import psutil

from trainers.cli import make_parser, run_main, silence_libraries
from trainers.config.dreambooth import MEMORY_PRESETS
from trainers.config.loading import load_config
from trainers.errors import UserError

TYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("config", help="a YAML file of a DreamBooth run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--memory", type=float, help="GiB to fit in; else what this machine has")
    parser.add_argument(
        "--precision",
        choices=TYPES,
        help="as accelerate's --mixed_precision; else bf16, no on a CPU",
    )
    parser.add_argument(
        "--tflops", type=float, help="what the accelerator reaches; else it is measured here"
    )
    arguments = parser.parse_args()
    configs = {
        name: load_config(arguments.config, [*arguments.overrides, f"train.memory={name}"])
        for name in MEMORY_PRESETS
    }
    if any(config.kind != "dreambooth" for config in configs.values()):
        raise UserError(f"{arguments.config} is no DreamBooth run: the small networks need no plan")
    silence_libraries()
    import torch

    from trainers.distributed.accelerator import best_device
    from trainers.memory_plan import matmul_rate, plan_memory

    device = best_device()
    gpu = device.type != "cpu" or arguments.memory is not None
    dtype = getattr(torch, TYPES[arguments.precision or ("bf16" if gpu else "no")])
    available_gib = arguments.memory or memory(device)
    rate = arguments.tflops * 1e12 if arguments.tflops else matmul_rate(device, dtype)
    print(f"{available_gib:.1f} GiB, {dtype}, {rate / 1e12:.2f} TFLOP/s")
    print(
        "| memory | peak GiB | of it | TFLOP per step | seconds at least | fits "
        "|\n|---|---|---|---|---|---|"
    )
    fits, seen = None, set()
    for name, config in configs.items():
        if (same := config.model_dump_json(exclude={"train": {"memory"}})) in seen:
            continue
        seen.add(same)
        needed = plan_memory(config, dtype, gpu)
        peak, flops = (
            needed.peak_bytes / 2**30,
            needed.flops * config.train.gradient_accumulation_steps,
        )
        if fits is None and peak < available_gib:
            fits = name
        of_it = ", ".join(f"{phase} {size / 2**30:.2f}" for phase, size in needed.phases.items())
        print(
            f"| {name} | {peak:.2f} | {of_it} | {flops / 1e12:.2f} | {flops / rate:.2f} | "
            f"{peak < available_gib} |"
        )
    print(
        f"train.memory={fits}"
        if fits
        else "none of them fits: see also accelerate_configs/fsdp2.yaml"
    )


def memory(device) -> float:
    """GiB of the accelerator, or free in the CPU's memory."""
    import torch

    free = (
        torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    )
    return free / 2**30


if __name__ == "__main__":
    sys.exit(run_main(main))
