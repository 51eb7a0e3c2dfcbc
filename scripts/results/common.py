"""What the scripts behind docs/results.md share."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from trainers.cli import make_parser
from trainers.config.loading import load_config
from trainers.run import run
from trainers.run_folder import FIGURES_NAME, read_metrics

Metrics = dict[str, float]


def results_parser(description: str, data: str) -> argparse.ArgumentParser:
    """A parser with --data, by default `data`, and --out."""
    parser = make_parser(description)
    parser.add_argument("--data", default=data, help="A name on the Hub, or a folder.")
    help = "The folder for the runs."
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help=help)
    return parser


def train(config: str, folder: Path, *overrides: str) -> tuple[Metrics, float]:
    """The metrics of a run, and the seconds of its training steps; a finished one is read again."""
    settings = load_config(f"configs/{config}.yaml", [f"output_dir={folder}", *overrides])
    if not (folder / FIGURES_NAME).exists():
        run(settings)
    seconds, last = 0.0, 0
    for row in read_metrics(folder):
        batches_per_second = row["images_per_second"] / settings.train.train_batch_size
        seconds += (row["step"] - last) / batches_per_second
        last = row["step"]
    return json.loads((folder / FIGURES_NAME).read_text()), seconds


def read_or_compute(path: Path, compute: Callable[[], Metrics]) -> Metrics:
    """The metrics in a JSON file, which is written first if it is not there."""
    if not path.exists():
        path.write_text(json.dumps(compute()))
    return json.loads(path.read_text())


def print_table(header: list[str], rows: list[list]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |")


def cycle_loader(loader: Iterable) -> Iterator:
    while True:
        yield from loader


def batches_for_seconds(seconds: float, loader: Iterable) -> Iterator:
    """Its batches, again and again, until the time is up."""
    end = time.perf_counter() + seconds
    return takewhile(lambda batch: time.perf_counter() < end, cycle_loader(loader))
