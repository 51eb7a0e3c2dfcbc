"""What the scripts behind docs/results.md share."""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

import torch

from trainers.cli import make_parser
from trainers.config.loading import load_config
from trainers.run import run
from trainers.run_folder import FIGURES_NAME, read_metrics


def parse_arguments(description: str, data: str, **more: dict) -> argparse.Namespace:
    """more: other options, each with the keywords of `add_argument`."""
    parser = make_parser(description)
    parser.add_argument("--data", default=data, help="Hub name, or a folder")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/results"), help="folder for the runs"
    )
    for name, keywords in more.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def train(config: str, folder: Path, *overrides: str) -> tuple[dict, float]:
    """Figures of a run, and the seconds of its training steps; a finished one is read again."""
    settings = load_config(f"configs/{config}.yaml", [f"output_dir={folder}", *overrides])
    if not (folder / FIGURES_NAME).exists():
        run(settings)
    rows = read_metrics(folder)
    steps = torch.tensor([row["step"] for row in rows]).diff(prepend=torch.zeros(1))
    rate = (
        torch.tensor([row["images_per_second"] for row in rows]) / settings.train.train_batch_size
    )
    return json.loads((folder / FIGURES_NAME).read_text()), float((steps / rate).sum())


def print_table(header: list[str], rows: list[list]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")


def cycle_loader(loader: Iterable) -> Iterator:
    while True:
        yield from loader


def batches_for_seconds(seconds: float, loader: Iterable) -> Iterator:
    """Its batches, again and again, until the time is up."""
    end = time.perf_counter() + seconds
    return takewhile(lambda batch: time.perf_counter() < end, cycle_loader(loader))
