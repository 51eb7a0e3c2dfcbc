"""Steps and seconds until a LoRA of the small world is good and stays so, by recipe.

python scripts/results/quality.py [--family sd15 sd3 flux] [--recipes NAME ...] [--seeds 21 22]

Each recipe trains on one thread, and is probed on the way in the same process: 24 samples of the
subject, of its class and of other classes are read by the judge. A run is good at the first of
three probes in a row that pass all lines of the gate, and ends there or at its last step. Probes
and class pictures are not counted in the seconds, which are of the processor. Each probe is written
as a line of JSON at once; runs that have ended are not trained again.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from quality_recipes import CONFIGS, RECIPES, Recipe

from small_world.gate import LEVELS
from small_world.probe import Prober, Streaks
from trainers import dreambooth
from trainers.cli import make_parser, positive_int, run_main, silence_libraries
from trainers.config import DreamBoothConfig
from trainers.config.loading import load_config
from trainers.distributed.accelerator import make_accelerator, record_precision
from trainers.training.loop import StepMetrics, StopReason, train
from trainers.training.optimizers import make_lr_schedule

# a quarter to an eighth apart, the same for all recipes
PROBES = [*range(25, 200, 25), *range(200, 400, 50), *range(400, 800, 100), *range(800, 4001, 200)]


class Probes:
    """The callback that probes, writes what it finds, and ends a run that is good."""

    def __init__(self, prober: Prober, task: dreambooth.DreamBooth, run: Mapping, log: Path):
        self.prober, self.task, self.run, self.log = prober, task, run, log
        self.streaks, self.seconds = Streaks(), 0.0
        self.mark = time.process_time()

    def __call__(self, step: int, _: StepMetrics) -> StopReason | None:
        if step not in PROBES:
            return None
        self.seconds += time.process_time() - self.mark
        metrics = self.prober(self.task)
        when = {"step": step, "seconds": round(self.seconds, 1)}
        self.streaks.add(metrics, when)
        rounded = {name: round(value, 3) for name, value in metrics.items()}
        self.write({**when, **rounded})
        shown = "  ".join(f"{name} {value:.2f}" for name, value in rounded.items())
        print(f"{self.run['recipe']}, seed {self.run['seed']}, step {step}: {shown}", flush=True)
        self.mark = time.process_time()
        return StopReason("it is good", step) if self.streaks.is_good("whole") else None

    def end(self, step: int) -> None:
        self.write({"end": step, "seconds": round(self.seconds, 1), "good": self.streaks.good})

    def write(self, line: Mapping) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({**self.run, **line}) + "\n")


def main() -> None:
    arguments = parse_arguments()
    silence_libraries()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "quality.jsonl"
    rows = []
    for family in arguments.family:
        prober = None
        for name in arguments.recipes:
            for seed in arguments.seeds:
                config = make_config(family, RECIPES[name], seed, arguments)
                run = {"family": family, "recipe": name, "seed": seed}
                run["settings"] = [*RECIPES[name].overrides(family), *arguments.set]
                run["limit"] = arguments.steps
                if find_end(log, run) is None:
                    prober = prober or Prober(config)
                    measure(config, run, prober, log)
                rows.append((run, find_end(log, run)))
    print_results(rows)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--family", nargs="+", choices=CONFIGS, default=["sd15"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23, 24, 25])
    help = "After which a run has failed."
    parser.add_argument("--steps", type=positive_int, default=1600, help=help)
    help = "Overrides of every recipe, to tune one."
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=help)
    help = "The folder for the figures, caches and class pictures."
    parser.add_argument("--out", type=Path, default=Path("runs/results/quality"), help=help)
    return parser.parse_args()


def make_config(
    family: str, recipe: Recipe, seed: int, arguments: argparse.Namespace
) -> DreamBoothConfig:
    out = arguments.out
    shared = [
        f"seed={seed}",
        f"output_dir={out / 'run'}",
        f"data.cache_dir={out / 'cache' / family}",
        f"train.max_train_steps={arguments.steps}",
        "validation.prompts=[]",
    ]
    overrides = [*recipe.overrides(family), *shared, *arguments.set]
    config = load_config(CONFIGS[family], overrides)
    if config.data.class_sets:
        # every run draws the same ones
        overrides.append(f"data.class_data_dir={out / 'class' / family}")
    return load_config(CONFIGS[family], overrides)


def measure(config: DreamBoothConfig, run: Mapping, prober: Prober, log: Path) -> None:
    """Train until the run is good or at its end."""
    accelerator, _ = make_accelerator(config)
    config = record_precision(config, accelerator)
    task, batches, _ = dreambooth.build(config, accelerator)
    probes = Probes(prober, task, run, log)
    rate = make_lr_schedule(config.optimizer, config.train.max_train_steps)
    loop = config.train, config.seed, accelerator, rate, [probes]
    probes.end(train(task, batches, *loop).step)


def find_end(log: Path, run: Mapping) -> dict | None:
    """The last line of a run with these settings, if it has ended."""
    for line in log.read_text().splitlines() if log.exists() else ():
        found = json.loads(line)
        if "end" in found and found == {**found, **run}:
            return found
    return None


def print_results(rows: list[tuple[Mapping, dict]]) -> None:
    """Each run, and the medians of each recipe's; a run that is not good counts with its end."""
    table, groups = [], {}
    for run, end in rows:
        key = run["family"], run["recipe"]
        row = [*key, run["seed"]]
        for name in LEVELS:
            good = end["good"].get(name)
            row.append(f"{good['step']}" if good else f"> {end['end']}")
        good = end["good"].get("whole")
        row.append(good["seconds"] if good else f"> {end['seconds']}")
        table.append(row)
        whole = good or {"step": end["end"], "seconds": end["seconds"]}
        groups.setdefault(key, []).append((whole["step"], whole["seconds"]))
    print_table(["family", "recipe", "seed", *LEVELS, "CPU-s"], table)
    print()
    medians = []
    for key, group in groups.items():
        medians.append([*key, *(median(part) for part in zip(*group, strict=True))])
    print_table(["family", "recipe", "median steps", "median CPU-s"], medians)


if __name__ == "__main__":
    sys.exit(run_main(main))
