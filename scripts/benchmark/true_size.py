"""Train a few steps of true size on a CPU, and prove that the file that comes out loads.

python scripts/benchmark/true_size.py [FAMILY ...] [--folder DIR] [--option KEY=VALUE ...]

The base has the layout and the sizes of the released one, and random weights in bfloat16: nothing
is fetched. It is written into a temporary folder a shard at a time, scripts/train.py trains on it,
and it is removed. SD1.5 takes 2 GB of disk, SD3.5 Medium 16 and Flux.1 34; docs/performance.md has
what they took.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.arms import Arm
from benchmark.bases import make_photos
from benchmark.launch import ROOT, Launcher, median_difference
from benchmark.readers import count_taken
from benchmark.shards import SHARD_BYTES, bytes_on_disk, meta_parts, write_base
from benchmark.sizes import PROMPT, RANK, SIZES
from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config.loading import dump_config, load_config
from trainers.distributed.accelerator import PRECISION_NAMES
from trainers.errors import RunFailedError, UserError
from trainers.families import FAMILIES
from trainers.memory_plan import MemoryPlan, plan_memory

SPARE_BYTES = 2**30  # of disk, for photos, cache, checkpoint and log
# at tiny size too a part is in several files
TINY_SHARD_BYTES = 2**15
HEADER = (
    "base",
    "GB on disk",
    "s per step",
    "CPU s per step",
    "peak GiB",
    "planned GiB",
    "planned / peak",
    "reload proof",
    "tensors that are taken",
)


@dataclass(frozen=True)
class Case:
    precision: str
    pixels: int
    steps: int
    options: tuple[str, ...] = ()


CASES = {
    "sd15": Case("no", 512, 3),
    "sd3": Case("bf16", 512, 2),
    "flux": Case("bf16", 256, 2, ("model.quantization=nf4", "train.gradient_checkpointing=true")),
}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    help = f"By default all of {', '.join(CASES)}."
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=help)
    help = "tiny takes seconds, to see it run."
    parser.add_argument("--size", choices=("tiny", "true"), default="true", help=help)
    help = "Where the temporary folder is made. By default where the system has them."
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()), help=help)
    pixels = ", ".join(f"{name} {case.pixels}" for name, case in CASES.items())
    help = f"Pixels of a side. By default {pixels}."
    parser.add_argument("--pixels", type=positive_int, help=help)
    parser.add_argument("--steps", type=positive_int, help="At least two, to time one.")
    help = "Settings of the runs beside their own, such as train.gradient_checkpointing=true."
    parser.add_argument("--option", nargs="+", default=[], metavar="KEY=VALUE", help=help)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.families if name not in CASES]:
        parser.error(f"there is no family {unknown[0]}")
    if not arguments.folder.is_dir():
        raise UserError(f"--folder {arguments.folder}: no such folder")
    if arguments.steps == 1:
        raise UserError("--steps 1: a step is timed from the end of one to the end of the next")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    rows = []
    for family in arguments.families or CASES:
        with TemporaryDirectory(dir=arguments.folder) as folder:
            rows.append(run_case(family, arguments, Path(folder)))
        print_rows(rows)


def run_case(family: str, arguments: argparse.Namespace, folder: Path) -> Sequence[object]:
    """The row of one family. Raises: UserError when the disk is too small, RunFailedError."""
    case, size = CASES[family], SIZES[family][arguments.size]
    parts = meta_parts(family, size)
    size_on_disk = bytes_on_disk(parts)
    check_disk(family, size_on_disk, arguments.folder)
    start = time.perf_counter()
    is_true = arguments.size == "true"
    write_base(family, parts, folder / "base", SHARD_BYTES if is_true else TINY_SHARD_BYTES)
    print(f"{family}: the base was written in {time.perf_counter() - start:.0f} s", flush=True)
    pixels = arguments.pixels or (case.pixels if is_true else size.resolution)
    make_photos(folder / "photos", pixels, count=1)
    options = [*case.options, *arguments.option]
    tree = make_config(family, case, pixels, size.t5_tokens, arguments.steps or case.steps)
    config = write_config(tree, options, folder)
    plan = plan_run(config)
    print(f"{family}: planned {describe(plan)}", flush=True)
    launcher = Launcher(folder, "cpu", case.precision, keeps_run=True)
    record = launcher.run(Arm("true size", ROOT / "scripts/train.py", [str(config)]))
    peak = record["peak_rss"] / 2**30
    planned = plan.peak_bytes / 2**30
    settings = load_config(config)
    taken = count_taken(FAMILIES[family](settings.model), launcher.folder / "run")
    texts = [f"{reader} {found} of {total}" for reader, (found, total) in taken.items()]
    return (
        f"{family} {pixels} px, {case.precision}, {' '.join(options)}",
        size_on_disk / 1e9,
        median_difference(record["steps"]),
        median_difference(record["cpu"]),
        peak,
        planned,
        planned / peak,
        read_proof(launcher.folder / "true-size.log"),
        "; ".join(texts),
    )


def check_disk(family: str, size: int, folder: Path) -> None:
    """Raises: UserError when a base does not fit."""
    needed, free = size + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{family} takes {needed / 1e9:.0f} GB of disk, and {folder} has {free / 1e9:.0f} GB "
            "free: choose another place with --folder"
        )


def write_config(tree: dict, options: Sequence[str], folder: Path) -> Path:
    """The file of the whole config of a run in a folder. Raises: UserError."""
    tree["output_dir"] = str(folder / "run")
    tree["model"]["pretrained_model_name_or_path"] = str(folder / "base")
    tree["data"]["instance_data_dir"] = str(folder / "photos")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    path.write_text(dump_config(load_config(path, options)))
    return path


def make_config(family: str, case: Case, pixels: int, t5_tokens: int, steps: int) -> dict:
    """The settings of a run, but for its folders."""
    tokens = {} if family == "sd15" else {"max_sequence_length": t5_tokens}
    return {
        "model": {"family": family, **tokens},
        "lora": {"rank": RANK},
        "data": {"instance_prompt": PROMPT, "resolution": pixels},
        "train": {"max_train_steps": steps, "mixed_precision": case.precision},
        "tracking": {"report_to": []},
    }


def plan_run(config: Path) -> MemoryPlan:
    """The plan of a run on a CPU."""
    settings = load_config(config)
    dtypes = {name: dtype for dtype, name in PRECISION_NAMES.items()}
    return plan_memory(settings, dtypes[settings.train.mixed_precision], has_cpu_memory=False)


def describe(plan: MemoryPlan) -> str:
    sizes = [f"{phase} {size / 2**30:.2f} GiB" for phase, size in plan.phases.items()]
    return ", ".join(sizes)


def read_proof(log: Path) -> str:
    """The difference that a run's reload proof found. Raises: RunFailedError."""
    found = re.search(r"reload proof: relative difference (\S+)", log.read_text())
    if not found:
        raise RunFailedError(f"{log} tells of no reload proof")
    return found[1]


def print_rows(rows: Sequence[Sequence[object]]) -> None:
    for row in (HEADER, ["---"] * len(HEADER), *rows):
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
