"""What scripts/plan.py predicts beside what runs really take on a CPU.

python scripts/results/memory.py [--steps 3] [--preload /usr/lib/x86_64-linux-gnu/libjemalloc.so.2]

A process's resident memory grows to its peak. It is counted from after the run of a tiny model of
the same family: by then libraries have read their code and compiled their kernels. glibc keeps much
of what a step frees, so each run is measured as it is, and when told to give blocks back at once
(slower), which shows what is really in use; with --preload also under that allocator. See
docs/performance.md.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.bases import make_base, make_photos
from benchmark.sizes import PROMPT, SIZES
from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config.loading import dump_config, load_config
from trainers.memory_plan import plan_memory
from trainers.run import run

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "131072"}
CASES = [
    ("sd15", ["lora.rank=4"]),
    ("sd15", ["train.train_batch_size=4", "train.gradient_checkpointing=true"]),
    ("sd3", ["data.resolution=384", "lora.rank=64", "lora.target_modules=all-linear"]),
    ("sd3", ["train.train_batch_size=4", "train.gradient_checkpointing=true"]),
    ("flux", ["train.train_batch_size=2"]),
    ("flux", ["data.resolution=512", "lora.rank=32", "train.gradient_checkpointing=true"]),
]


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=3, help="Steps of each run.")
    parser.add_argument("--preload", help="A library with another malloc.")
    help = "A tiny config and one to measure, to run in this process."
    parser.add_argument("--child", nargs=2, help=help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    if arguments.child:
        print_growth(*arguments.child)
        return
    arms = {"in use": GIVE_BACK, "as it is": {}}
    if arguments.preload:
        arms["preloaded"] = {"LD_PRELOAD": arguments.preload}
    header = ["", "planned MiB"]
    for arm in arms:
        header += [arm, "error"]
    rows = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_photos(root / "photos", 512)
        for family in SIZES:
            for size in ("tiny", "mid"):
                make_base(family, size, root / f"{family}-{size}", torch.device("cpu"))
        for family, overrides in CASES:
            tiny = write_config(root, family, "tiny", [], 2)
            config = write_config(root, family, "mid", overrides, arguments.steps)
            plan = plan_memory(load_config(config), torch.float32, has_cpu_memory=True)
            planned = plan.peak_bytes / 2**20
            row = [f"{family} {' '.join(overrides)}", planned]
            for environment in arms.values():
                grown = measure_growth(tiny, config, root, environment)
                row += [grown, planned / grown - 1]
            rows.append(row)
            print_table(header, rows)


def print_growth(tiny: str, config: str) -> None:
    """Run a tiny config and then another, and print by how many MiB this process has grown."""
    run(load_config(tiny))
    before = resident("VmRSS")
    run(load_config(config))
    print(f"grown {resident('VmHWM') - before}")


def write_config(root: Path, family: str, size: str, overrides: list[str], steps: int) -> Path:
    """Write the config of a run of some steps on a base in `root`."""
    base = f"{family}-{size}"
    model = {"family": family, "pretrained_model_name_or_path": str(root / base)}
    if family != "sd15":
        model["max_sequence_length"] = SIZES[family][size].t5_tokens
    data = {
        "instance_data_dir": str(root / "photos"),
        "instance_prompt": PROMPT,
        "resolution": SIZES[family][size].resolution,
    }
    tree = {
        "output_dir": str(root / f"run-{base}"),
        "model": model,
        "data": data,
        "train": {"max_train_steps": steps},
        "tracking": {"report_to": []},
    }
    path = root / f"{base}.yaml"
    path.write_text(yaml.dump(tree))
    path.write_text(dump_config(load_config(path, overrides)))
    return path


def resident(which: str) -> float:
    """MiB: VmRSS now, or VmHWM at the peak.

    The peak of getrusage begins with that of the process which started this one.
    """
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_growth(tiny: Path, config: Path, root: Path, environment: dict[str, str]) -> float:
    """MiB that a process of its own has grown by."""
    for run_folder in root.glob("run-*"):
        shutil.rmtree(run_folder)
    command = [sys.executable, __file__, "--child", str(tiny), str(config)]
    added = os.environ | environment
    process = subprocess.run(command, env=added, capture_output=True, text=True, check=True)
    return float(re.search(r"grown (\S+)", process.stdout)[1])


if __name__ == "__main__":
    sys.exit(run_main(main))
