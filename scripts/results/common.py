"""What the scripts behind docs/results.md share."""

import argparse
import json
import time
from pathlib import Path

import torch

from trainers.config import load
from trainers.run import run


def arguments(description: str, data: str, **more: dict) -> argparse.Namespace:
    """more: other options, each with the keywords of `add_argument`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=data, help="Hub name, or a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder for the runs")
    for name, keywords in more.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def train(config: str, folder: Path, *overrides: str) -> tuple[dict, float]:
    """Figures of a run, and the seconds of its training steps; a finished one is read again."""
    if not (folder / "figures.json").exists():
        run(load(f"configs/{config}.yaml", [f"output_dir={folder}", *overrides]))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    batch = torch.tensor([row["step"] for row in rows]).diff(prepend=torch.zeros(1)) * batch_size(folder)
    rate = torch.tensor([row["images_per_second"] for row in rows])
    return json.loads((folder / "figures.json").read_text()), float((batch / rate).sum())


def batch_size(folder: Path) -> int:
    from trainers.config import parse

    return parse((folder / "config.yaml").read_text())["train"]["train_batch_size"]


def print_table(header: list[str], rows: list[list]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")


class Clock:
    """`until(seconds)` of work: an endless count of steps that ends with the time."""

    @staticmethod
    def until(seconds: float):
        start, step = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            yield step
            step += 1
