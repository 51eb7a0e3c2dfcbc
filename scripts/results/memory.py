"""What scripts/plan.py foretells beside what runs really take on a CPU (docs/performance.md).

python scripts/results/memory.py [--steps 3] [--preload /usr/lib/x86_64-linux-gnu/libjemalloc.so.2]

A process's resident memory grows to its peak. It is counted from after the run of a tiny model of
the same family: by then libraries have read their code and compiled their kernels. glibc keeps much
of what a step frees, so each run is measured as it is, and told to give blocks back at once
(slower), which shows what is really in use; with --preload also under that allocator.
"""

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
from trainers.cli import make_parser, run_main, silence_libraries
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


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--preload", help="a library with another malloc")
    parser.add_argument(
        "--child", nargs=2, help="a tiny config and one to measure, to run in this process"
    )
    arguments = parser.parse_args()
    silence_libraries()
    if arguments.child:
        tiny, config = map(load_config, arguments.child)
        run(tiny)
        before = resident("VmRSS")
        run(config)
        print(f"grown {resident('VmHWM') - before}")
        return
    arms = {"in use": GIVE_BACK, "as it is": {}}
    if arguments.preload:
        arms["preloaded"] = {"LD_PRELOAD": arguments.preload}
    rows = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_photos(root / "photos", 512)
        for family in SIZES:
            for size in ("tiny", "mid"):
                make_base(family, size, root / f"{family}-{size}", torch.device("cpu"))
        for i, (family, overrides) in enumerate(CASES):
            tiny = write_config(root, family, "tiny", [], 2, f"{i}-tiny")
            config = write_config(root, family, "mid", overrides, arguments.steps, str(i))
            planned = (
                plan_memory(load_config(config), torch.float32, has_cpu_memory=False).peak_bytes
                / 2**20
            )
            row = [f"{family} {' '.join(overrides)}", planned]
            for environment in arms.values():
                grown = measure_growth(tiny, config, root, environment)
                row += [grown, planned / grown - 1]
            rows.append(row)
            print_table(
                ["", "planned MiB", *(column for arm in arms for column in (arm, "error"))], rows
            )


def write_config(
    root: Path, family: str, size: str, overrides: list[str], steps: int, name: str
) -> Path:
    tree = {
        "output_dir": str(root / f"run-{name}"),
        "model": {
            "family": family,
            "pretrained_model_name_or_path": str(root / f"{family}-{size}"),
        },
        "data": {
            "instance_data_dir": str(root / "photos"),
            "instance_prompt": PROMPT,
            "resolution": SIZES[family][size].resolution,
        },
        "train": {"max_train_steps": steps},
        "tracking": {"report_to": []},
    }
    if family != "sd15":
        tree["model"]["max_sequence_length"] = SIZES[family][size].t5_tokens
    path = root / f"{name}.yaml"
    path.write_text(yaml.dump(tree))
    path.write_text(dump_config(load_config(path, overrides)))
    return path


def resident(which: str) -> float:
    """MiB: VmRSS now, or VmHWM at the peak; getrusage's peak begins with that of the process which
    started this one."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_growth(tiny: Path, config: Path, root: Path, environment: dict[str, str]) -> float:
    """MiB."""
    for run_folder in root.glob("run-*"):
        shutil.rmtree(run_folder)
    command = [sys.executable, __file__, "--child", str(tiny), str(config)]
    process = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(re.search(r"grown (\S+)", process.stdout)[1])


if __name__ == "__main__":
    sys.exit(run_main(main))
