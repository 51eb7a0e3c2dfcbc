"""The results as a table and as bars, and what they were measured on."""

from __future__ import annotations

import os
import platform
import statistics
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import psutil
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

METRIC_NAMES = {
    "loaded": "loaded, s",
    "first": "first step done, s",
    "step": "ms per step",
    "cpu": "CPU ms per step",
    "rate": "images/s",
    "hundred": "100 images, s",
    "whole": "whole run, s",
    "memory": "peak memory, GiB",
    "mfu": "MFU, %",
}
COMPARED = ("step", "hundred", "memory")


def machine(device: str) -> dict:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    versions = {name: version(name) for name in packages}
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {"python": platform.python_version()} | versions,
        "date": date.today().isoformat(),
    }


def num_threads() -> int:
    """The threads of each arm: OMP_NUM_THREADS, or as many as there are cores."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    return int(os.environ.get("OMP_NUM_THREADS") or cores)


def median_of(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def results_table(results: dict) -> str:
    """Medians over the rounds, the step's with its range; how many times ours each peer takes.

    Below them are notes on the checks.
    """
    headings = metric_headings(results)
    lines, ratios, notes = [], [], []
    for name, case in results["cases"].items():
        for arm, rows in case["rounds"].items():
            lines.append([f"{name}, {arm}", *median_cells(rows, headings)])
            if arm != "ours":
                ratios.append([f"{name}, {arm}", *ratio_cells(rows, case["rounds"]["ours"])])
        for arm, check in case["checks"].items():
            notes.append(f"- {name}, {arm}: {note(check)}")
    parts = [markdown_table(["", *headings.values()], lines)]
    if ratios:
        compared = [headings[name] for name in COMPARED]
        parts.append(markdown_table(["times ours", *compared], ratios))
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def median_cells(rows: list[dict], headings: dict[str, str]) -> list[str]:
    """The median of each metric over the rounds; the step's with its range."""
    cells = {name: f"{median_of(rows, name):.4g}" for name in headings}
    steps = [row["step"] for row in rows]
    cells["step"] += f" ({min(steps):.4g} to {max(steps):.4g})"
    return list(cells.values())


def ratio_cells(rows: list[dict], ours: list[dict]) -> list[str]:
    """How many times our median each median is."""
    return [f"{median_of(rows, name) / median_of(ours, name):.2f}" for name in COMPARED]


def metric_headings(results: dict) -> dict[str, str]:
    """The metrics' names, which say whether 100 images were seen and what MFU is a share of."""
    arguments, headings = results["arguments"], dict(METRIC_NAMES)
    fewest = min(case["steps"] for case in results["cases"].values())
    if fewest * int(arguments["batch"]) < 100:
        headings["hundred"] += " (extrapolated)"
    peak = arguments["peak_tflops"]
    is_measured = peak == "None"
    headings["mfu"] += " of a measured matrix product" if is_measured else f" of {peak} TFLOP/s"
    return headings


def note(check: dict) -> str:
    if "names" in check:
        return f"LoRA is on other layers: {', '.join(check['names'][:4])}"
    difference, cosine = check["loss_difference"], check["gradient_cosine"]
    text = f"the loss differs by {difference:.1e}, the gradients' cosine is {cosine:.7f}"
    if far := check.get("ours_from_float32"):
        allowed = check["theirs_from_float32"]
        text += f"; from float32 ours differs by {far['loss']:.1e} in the loss and"
        text += f" {far['gradient']:.1e} in the gradients, theirs by {allowed['loss']:.1e} and"
        text += f" {allowed['gradient']:.1e}"
    if not check["equal"]:
        return f"{text}: not equal, so there are no figures"
    if "flops" in check:
        counted = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in check["flops"].items())
        text += f"; GFLOP for one picture: {counted}"
        text += f"; matrix product {check['matmul_tflops']:.3g} TFLOP/s"
    if ms := check.get("overhead_ms"):
        text += f"; the loop takes {ms['loop']:.2f} ms, the bare step {ms['bare']:.2f}"
        text += f": overhead {ms['over']:.2f} ms"
    return text


def plot(results: dict, path: Path) -> None:
    """Write the metrics that are compared as bars, each arm's beside the others'."""
    cases = {name: case["rounds"] for name, case in results["cases"].items() if case["rounds"]}
    if not cases:
        return
    figure, headings = Figure((11, 4), layout="constrained"), metric_headings(results)
    arms = list(dict.fromkeys(chain(*cases.values())))
    for axes, name in zip(figure.subplots(1, len(COMPARED)), COMPARED, strict=True):
        plot_metric(axes, cases, arms, name)
        axes.set_title(headings[name], fontsize=10)
    legend = axes.get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=len(arms), fontsize=8)
    place = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    label = f"{place['gpu'] or place['processor']}, {place['cores']} cores"
    label += f", threads: {place['threads']}, {place['date']}"
    figure.suptitle(f"{label}\n{versions}", fontsize=8)
    figure.savefig(path, dpi=120)


def plot_metric(axes: Axes, cases: dict[str, dict], arms: list[str], name: str) -> None:
    """Draw the medians of a metric as bars, with the range over the rounds."""
    width = 0.8 / len(arms)
    for k, arm in enumerate(arms):
        places, heights, below, above = [], [], [], []
        for x, rounds in enumerate(cases.values()):
            if arm not in rounds:
                continue
            values = [row[name] for row in rounds[arm]]
            middle = statistics.median(values)
            places.append(x + k * width)
            heights.append(middle)
            below.append(middle - min(values))
            above.append(max(values) - middle)
        axes.bar(places, heights, width, yerr=[below, above], label=arm, capsize=2)
    middles = [x + 0.4 - width / 2 for x in range(len(cases))]
    axes.set_xticks(middles, list(cases), fontsize=8)
