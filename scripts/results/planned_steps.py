"""What the plan of `scripts/plan.py` says of the steps that `scripts/benchmark --inside` times.

python scripts/results/planned_steps.py [CELL ...]

The cells are of true size, in bfloat16 on a GPU, without a weight. It prints the peak of a step in
GiB for each, beside the peak that was measured on an H200 where there is one. Half a minute of
computing each, or more. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import print_table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import bases
from benchmark.cells import CELLS
from benchmark.in_memory import make_settings
from benchmark.sizes import Size
from reference.models import PIPELINES
from trainers.cli import make_parser, run_main, silence_libraries
from trainers.memory_plan import plan_memory

# GiB that PyTorch allocated there at commit 9d5df36, corrected as docs/performance.md tells
MEASURED = {
    "sd15-512-bs1": 2.5,
    "sd15-512-bs4": 4.8,
    "sd3-1024-bs1": 12.2,
    "flux-512-bs1": 30.8,
    "flux-1024-bs1-checkpointing": 25.7,
    "flux-1024-bs1-selective": 35.3,
    "flux-1024-bs1": 45.1,
}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = f"By default {', '.join(MEASURED)}."
    parser.add_argument("cells", nargs="*", metavar="CELL", choices=[[], *CELLS], help=help)
    return parser.parse_args()


def write_configs(family: str, size: Size, folder: Path) -> None:
    """The folder of a pipeline of this size, without its weights."""
    with torch.device("meta"):
        parts = bases.make_parts(family, size)
    PIPELINES[family](**parts).save_config(folder)
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(folder / name)
        elif family_is_transformers(part):
            part.config.save_pretrained(folder / name)
        else:
            part.save_config(folder / name)


def family_is_transformers(part: nn.Module) -> bool:
    return type(part).__module__.startswith("transformers.")


def planned_gib(name: str, folder: Path) -> float:
    cell = CELLS[name]
    size = cell.size("true")
    base = folder / name
    write_configs(cell.family, size, base)
    options = ["validation.prompts=[]"]
    if size.t5_tokens:
        options.append(f"model.max_sequence_length={size.t5_tokens}")
    config = make_settings(cell, size, base, *options)
    plan = plan_memory(config, torch.bfloat16, has_cpu_memory=True)
    return plan.phases["train"] / 2**30


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    rows = []
    with TemporaryDirectory() as folder:
        for name in arguments.cells or MEASURED:
            planned, measured = planned_gib(name, Path(folder)), MEASURED.get(name)
            ratio = planned / measured if measured else "not calibrated on a GPU"
            rows.append([name, planned, measured or "", ratio])
            print_table(["", "planned GiB", "measured GiB", "planned / measured"], rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
