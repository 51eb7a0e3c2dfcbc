"""What scripts/plan.py foretells beside what runs really take on a CPU (docs/performance.md).

python scripts/results/memory.py [--steps 3]

A process's resident memory grows from after the imports to its peak. glibc keeps much of what a step frees, so each run
is measured twice: as it is, and told to give large blocks back at once (slower), which shows what is really in use.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
import yaml
from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.bases import PROMPT, SIZES, make_base, make_photos

from trainers.cli import exit_status, parser_of, silence
from trainers.config import dump, load
from trainers.observers import peak_memory
from trainers.plan import plan
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
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", type=Path, help="a config to run and measure, in this process")
    chosen = parser.parse_args()
    silence()
    if chosen.child:
        before = psutil.Process().memory_info().rss / 2**20
        run(load(chosen.child))
        print(f"grown {1024 * peak_memory() - before}")
        return
    rows = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        make_photos(root / "photos", 512)
        for i, (family, overrides) in enumerate(CASES):
            if not (root / family).exists():
                make_base(family, "mid", root / family, torch.device("cpu"))
            config = written(root, family, overrides, chosen.steps, i)
            planned = plan(config, torch.float32, away=False).peak / 2**20
            grown = [measured(root / f"{i}.yaml", root, environment) for environment in (GIVE_BACK, {})]
            rows.append([f"{family} {' '.join(overrides)}", planned, grown[0], planned / grown[0] - 1, grown[1]])
            print_table(["", "planned MiB", "in use", "error", "as it is"], rows)


def written(root: Path, family: str, overrides: list[str], steps: int, i: int):
    size = SIZES[family]["mid"]
    tree = {
        "output_dir": str(root / f"run-{i}"),
        "model": {"family": family, "pretrained_model_name_or_path": str(root / family)},
        "data": {"instance_data_dir": str(root / "photos"), "instance_prompt": PROMPT, "resolution": size.resolution},
        "train": {"max_train_steps": steps},
        "tracking": {"report_to": []},
    }
    if family != "sd15":
        tree["model"]["max_sequence_length"] = size.t5_tokens
    path = root / f"{i}.yaml"
    path.write_text(yaml.dump(tree))
    config = load(path, overrides)
    path.write_text(dump(config))
    return config


def measured(config: Path, root: Path, environment: dict[str, str]) -> float:
    """MiB."""
    for run_folder in root.glob("run-*"):
        shutil.rmtree(run_folder)
    command = [sys.executable, __file__, "--child", str(config)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return float(re.search(r"grown (\S+)", done.stdout)[1])


if __name__ == "__main__":
    sys.exit(exit_status(main))
