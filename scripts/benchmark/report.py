"""The results as a table and as bars, and on what they were measured."""

from __future__ import annotations

import os
import platform
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

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
    names = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
        "date": date.today().isoformat(),
    }


def threads() -> int:
    """Of each arm: OMP_NUM_THREADS, or as many as there are cores."""
    return int(
        os.environ.get("OMP_NUM_THREADS") or psutil.cpu_count(logical=False) or os.cpu_count()
    )


def median_of(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def results_table(results: dict) -> str:
    """Medians over the rounds, the step's with its range; how many times ours each peer takes;
    notes."""
    headings = metric_headings(results)
    lines = [["", *headings.values()], ["---"] * (len(headings) + 1)]
    ratios = [["times ours", *(headings[name] for name in COMPARED)], ["---"] * (len(COMPARED) + 1)]
    notes = []
    for name, case_result in results["cases"].items():
        for arm, rows in case_result["rounds"].items():
            row, steps = (
                {figure: f"{median_of(rows, figure):.4g}" for figure in headings},
                [r["step"] for r in rows],
            )
            row["step"] = f"{statistics.median(steps):.4g} ({min(steps):.4g} to {max(steps):.4g})"
            lines.append([f"{name}, {arm}", *row.values()])
            if arm != "ours":
                ours = case_result["rounds"]["ours"]
                times = (median_of(rows, figure) / median_of(ours, figure) for figure in COMPARED)
                ratios.append([f"{name}, {arm}", *(f"{value:.2f}" for value in times)])
        notes += [f"- {name}, {arm}: {note(check)}" for arm, check in case_result["checks"].items()]
    parts = [lines, ratios] if len(ratios) > 2 else [lines]
    tables = ["\n".join("| " + " | ".join(row) + " |" for row in part) for part in parts]
    return "\n\n".join([*tables, "\n".join(notes)]) + "\n"


def metric_headings(results: dict) -> dict[str, str]:
    """What the figures are called here: whether 100 images were seen, and what MFU is a share
    of."""
    arguments, heads = results["arguments"], dict(METRIC_NAMES)
    if any(found["steps"] * int(arguments["batch"]) < 100 for found in results["cases"].values()):
        heads["hundred"] += " (extrapolated)"
    peak_tflops = arguments["peak_tflops"]
    heads["mfu"] += (
        " of a measured matrix product" if peak_tflops == "None" else f" of {peak_tflops} TFLOP/s"
    )
    return heads


def note(check: dict) -> str:
    difference, cosine = check["loss_difference"], check["gradient_cosine"]
    text = f"the loss differs by {difference:.1e}, the gradients' cosine is {cosine:.7f}"
    if not check["equal"]:
        return f"{text}: not equal, so there are no figures"
    if "flops" in check:
        counted = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in check["flops"].items())
        text += (
            f"; GFLOP for one picture: {counted}; matrix product "
            f"{check['matmul_tflops']:.3g} TFLOP/s"
        )
    if ms := check.get("overhead_ms"):
        text += (
            f"; the loop takes {ms['loop']:.2f} ms, the bare step {ms['bare']:.2f}: overhead "
            f"{ms['over']:.2f} ms"
        )
    return text


def plot(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    cases = {name: found["rounds"] for name, found in results["cases"].items() if found["rounds"]}
    if not cases:
        return
    figure, place = Figure((11, 4), layout="constrained"), results["machine"]
    arms = list(dict.fromkeys(arm for rounds in cases.values() for arm in rounds))
    for axes, name in zip(figure.subplots(1, 3), COMPARED, strict=True):
        for k, arm in enumerate(arms):
            here = [(x, rounds[arm]) for x, rounds in enumerate(cases.values()) if arm in rounds]
            heights = [median_of(rows, name) for _, rows in here]
            spread = [
                [abs(limit(r[name] for r in rows) - median_of(rows, name)) for _, rows in here]
                for limit in (min, max)
            ]
            width = 0.8 / len(arms)
            axes.bar(
                [x + k * width for x, _ in here], heights, width, yerr=spread, label=arm, capsize=2
            )
        axes.set_xticks(
            [x + 0.4 - 0.4 / len(arms) for x in range(len(cases))], list(cases), fontsize=8
        )
        axes.set_title(metric_headings(results)[name], fontsize=10)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(arms), fontsize=8
    )
    versions = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    label = (
        f"{place['gpu'] or place['processor']}, {place['cores']} cores, threads: "
        f"{place['threads']}, {place['date']}"
    )
    figure.suptitle(f"{label}\n{versions}", fontsize=8)
    figure.savefig(path, dpi=120)
