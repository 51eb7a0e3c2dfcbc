"""What is told of the best validation of a run: at its end, in its report and on its card."""

from __future__ import annotations

from pathlib import Path

from trainers.run_folder import BEST, read_best

# the part of a run since the best validation from which that is long ago
LONG_AGO = 0.25


def describe_best(run: Path, steps: int) -> str:
    """Which step of so many was the best; empty where no best weights are kept."""
    record = read_best(run / BEST)
    if not record:
        return ""
    step = record["step"]
    text = f"{name_best(record)} at step {step}"
    if step >= steps:
        return f"{text}, the last one"
    if steps - step <= LONG_AGO * steps:
        return text
    return f"{text}: that was {steps - step} steps before the end, and none was better since"


def name_best(record: dict) -> str:
    """The metric and its value."""
    return f"{record['metric'].replace('_', ' ')} {record['value']:.4g}"


def best_facts(folder: Path) -> dict[str, object]:
    """For the table of a card: the best weights beside the others, or that these are the best.

    folder: a run's, or that of what is pushed of it, which has the record of its weights itself.
    """
    if record := read_best(folder):
        return {"Chosen": f"{name_best(record)}, the best of the validations"}
    if record := read_best(folder / BEST):
        return {"Best": f"{name_best(record)} at step {record['step']}, kept in {BEST}/"}
    return {}
