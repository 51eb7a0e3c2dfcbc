"""A run folder as one HTML file that needs nothing else: pictures, curves, metrics, config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from markupsafe import Markup

from trainers.atomic import write_atomic
from trainers.config import KINDS, AutoencoderConfig, Config, DreamBoothConfig, UNetConfig
from trainers.config.loading import read_tree
from trainers.errors import UserError
from trainers.publishing.best import describe_best
from trainers.publishing.charts import Record, line_charts
from trainers.publishing.embedding import (
    final_pictures,
    nearest_pictures,
    slider,
    training_pictures,
)
from trainers.publishing.html import environment, is_finite_number, parts
from trainers.publishing.markdown import unescape_markdown
from trainers.publishing.photo_page import training_photos
from trainers.publishing.public import public_config, public_text
from trainers.run_folder import (
    BEST,
    CARD_NAME,
    CHECKPOINTS,
    CONFIG_NAME,
    EVALUATION,
    EVALUATION_NAME,
    FIGURES_NAME,
    GRID_NAME,
    MANIFEST_NAME,
    PUBLIC_REPORT_NAME,
    REPORT_NAME,
    VALIDATION_SECONDS,
    list_checkpoints,
    parse_json_line,
    read_best,
    read_metrics,
    read_run_config,
    sample_grids,
)
from trainers.training.status import (
    FAILED,
    FINISHED,
    GONE,
    RUNNING,
    STOPPED,
    RunStatus,
    read_status,
)

# How often a browser reads the page of a run that trains.
REFRESH_SECONDS = 10
STATE_WORDS = {
    RUNNING: "running",
    FINISHED: "finished",
    STOPPED: "stopped",
    FAILED: "failed",
    GONE: "ended without a word, as a killed process does",
}
COST_METRICS = ("images_per_second", "peak_memory_gib", VALIDATION_SECONDS)
# A row of the model card's table, whose cells may contain an escaped |.
CARD_ROW = re.compile(
    r"^\| ((?:\\.|[^|\\ ])(?:\\.|[^|\\])*?) \| ((?:\\.|[^|\\])*) \|$", re.MULTILINE
)


def write_report(run: Path, pictures: bool = True, config: Config | None = None) -> Path:
    """Write what a run folder contains, finished or not, as one HTML file, and return its path.

    pictures: show the training pictures. `report.html` has them and is for its owner; without them
    the file is `report_public.html`, which may be uploaded and names no place on this machine.
    config: the run's, where it is known. Raises: UserError when `run` is not a run folder, or has
    mistakes in its config.
    """
    if config is None:
        check_kind(run)
        config = read_run_config(run)
    text, title = read_if_present(run / CONFIG_NAME), run.resolve().name
    if not pictures:
        config = public_config(config)
        text, title = public_text(config), config.output_dir.name
    status = read_status(run)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        kind=config.kind,
        lead=describe_run(config),
        sections=build_sections(run, config, pictures, status),
        config=text,
        refresh_seconds=REFRESH_SECONDS if status and status.is_running and pictures else 0,
    )
    out = run / (REPORT_NAME if pictures else PUBLIC_REPORT_NAME)
    write_atomic(out, page)
    return out


def check_kind(run: Path) -> None:
    """Raises: UserError when a folder is not a run's."""
    try:
        kind = str(read_tree(run / CONFIG_NAME).get("kind"))
    except UserError:
        kind = ""
    if kind not in KINDS:
        kinds = ", ".join(KINDS)
        message = f"{run} is not a run folder: it has no {CONFIG_NAME} with a kind ({kinds})"
        raise UserError(message)


def describe_run(config: Config) -> str:
    """What was trained, in a line."""
    data = config.data
    if isinstance(config, DreamBoothConfig):
        subject = f"A {config.lora.title} for" if config.lora else "All weights of"
        base = config.model.pretrained_model_name_or_path
        prompts = ", ".join(f"“{prompt}”" for prompt in data.instance_prompts)
        noun = "prompt" if len(data.instance_prompts) == 1 else "prompts"
        return f"{subject} {base}" + (f", trained on the {noun} {prompts}" if prompts else "")
    name = {"gan": "A GAN", "autoencoder": "An autoencoder", "unet": "A U-Net"}[config.kind]
    if isinstance(config, (AutoencoderConfig, UNetConfig)):
        name += f" ({config.use})"
    color = "gray" if data.channels == 1 else "color"
    source = Path(data.image_dir or data.dataset_name or "").name
    return f"{name} trained from scratch on {data.resolution}-pixel {color} pictures: {source}"


def build_sections(
    run: Path, config: Config, pictures: bool, status: RunStatus | None = None
) -> dict[str, Markup]:
    """HTML by title, in order; empty where the run has nothing to show.

    Of a run that trains, the training pictures are left out: they do not change, and take the
    longest to read.
    """
    is_live = status is not None and status.is_running
    lines = read_metrics(run)
    metrics = parse_json_line(read_if_present(run / FIGURES_NAME))
    evaluation = parse_json_line(read_if_present(run / EVALUATION_NAME))
    training, costs = [], []
    for line in lines:
        training.append({key: value for key, value in line.items() if key not in COST_METRICS})
        costs.append({key: line[key] for key in ("step", *COST_METRICS) if key in line})
    return {
        "": metric_summary(metrics, evaluation)
        + overview(run, config, lines)
        + describe_state(status, config, lines, is_public=not pictures),
        "Warnings": parts.warnings(status.warnings if status and pictures else []),
        "Result": final_pictures(run, config),
        "Samples over time": slider(sample_grids(run)),
        "Training": line_charts(training, "step", read_best(run / BEST).get("step")),
        **evaluation_sections(run, evaluation, pictures),
        "Training pictures": shown_pictures(run, config, lines)
        if pictures and not is_live
        else Markup(),
        "Speed and memory": line_charts(costs, "step"),
        "Facts": card_facts(read_if_present(run / CARD_NAME)),
    }


def evaluation_sections(run: Path, evaluation: Record, pictures: bool) -> dict[str, Markup]:
    """What scripts/evaluate.py measured; all empty for a run that it has not seen."""
    rows, strength = evaluation.get("rows", []), evaluation.get("strength", [])
    best = evaluation.get("best")
    best_step = best_row(evaluation).get("step") if best else None
    grids = sorted(run.glob(f"{EVALUATION}/strength-*/{GRID_NAME}"))
    spectrum = []
    for rank, share in evaluation.get("spectrum", {}).items():
        spectrum.append({"rank": int(rank), "share": share})
    strength_table = parts.folded_table(strength, column_names(strength))
    pairs = evaluation.get("memorisation", [])
    return {
        "Fidelity": line_charts(rows, "step", best_step)
        + parts.table(rows, column_names(rows), best),
        "Strength of the LoRA": line_charts(strength, "scale") + strength_table + slider(grids),
        "Share of the update by rank": line_charts(
            spectrum, "rank", evaluation.get("suggested_rank")
        ),
        "Nearest training pictures": nearest_pictures(run, pairs, pictures),
    }


def shown_pictures(run: Path, config: Config, lines: Sequence[Record]) -> Markup:
    """The training pictures; photos with their crops and captions."""
    if not isinstance(config, DreamBoothConfig):
        return training_pictures(config.data)
    step = max((line["step"] for line in lines), default=0)
    train = config.train
    rows = global_batch_size(run) or train.train_batch_size * train.gradient_accumulation_steps
    return training_photos(config, step * rows)


def best_row(evaluation: Record) -> Record:
    """The row of the best checkpoint, or the last row where none is called the best."""
    for row in reversed(evaluation.get("rows", [])):
        if evaluation.get("best") in (row["checkpoint"], None):
            return row
    return {}


def column_names(rows: Sequence[Record]) -> list[str]:
    """The names of all columns, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def metric_summary(metrics: Record, evaluation: Record) -> Markup:
    """The most important numbers as tiles, and the texts about them below."""
    best = best_row(evaluation)
    measured = {name: best[name] for name in best if name not in ("checkpoint", "step")}
    values = metrics | measured | evaluation
    numbers = {name: value for name, value in values.items() if is_finite_number(value)}
    notes = {name: value for name, value in values.items() if isinstance(value, str)}
    return parts.summary(numbers, notes)


def overview(run: Path, config: Config, lines: Sequence[Record]) -> Markup:
    """How far the run came, and what its loop took in time and memory."""
    step = max((line["step"] for line in lines), default=0)
    last = config.train.max_train_steps
    values: Record = {"steps": step if step == last else f"{step} of {last}"}
    seconds, speeds = 0.0, number_column(lines, "images_per_second")
    images = global_batch_size(run)
    if len(speeds) == len(lines) > 0 and images:
        # each line has the speed since the line before it
        spans = [b - a for a, b in pairwise([0, *(line["step"] for line in lines)])]
        seconds = sum(span * images / speed for span, speed in zip(spans, speeds, strict=True))
        values["time"] = str(timedelta(seconds=round(seconds)))
    if speeds:
        values["images per second"] = median(speeds)
    if peaks := number_column(lines, "peak_memory_gib"):
        values["peak memory"] = f"{max(peaks):.3g} GiB"
    notes = {
        "best validation": describe_best(run, step),
        "validations": describe_validation(lines, seconds),
    }
    told = {name: text for name, text in notes.items() if text}
    return parts.tiles(values, "") + parts.summary({}, told)


def describe_state(
    status: RunStatus | None, config: Config, lines: Sequence[Record], is_public: bool
) -> Markup:
    """Whether the run trains, has ended, and how; nothing of a finished one that says no more.

    is_public: leave out when and by which words, which may name places on this machine.
    """
    if status is None or is_public:
        step = max((line["step"] for line in lines), default=0)
        is_over = step >= config.train.max_train_steps
        return Markup() if is_over else parts.state("not finished", None)
    return parts.state(STATE_WORDS.get(status.state, status.state), status)


def describe_validation(lines: Sequence[Record], total: float) -> str:
    """What the validations took, each and of so many seconds of the run; empty without any."""
    seconds = number_column(lines, VALIDATION_SECONDS)
    if not seconds:
        return ""
    share = f", {sum(seconds) / total:.1%} of the time" if total else ""
    return f"{fmean(seconds):.2g} s each{share}"


def number_column(lines: Sequence[Record], name: str) -> list[float]:
    """The positive numbers of that name, of the lines that have one."""
    values = [line.get(name) for line in lines]
    return [value for value in values if is_finite_number(value) and value > 0]


def global_batch_size(run: Path) -> int | None:
    """How many pictures each step had, as the newest checkpoint that says so has it."""
    for folder in list_checkpoints(run / CHECKPOINTS):
        facts = parse_json_line(read_if_present(folder / MANIFEST_NAME)).get("facts")
        if isinstance(facts, dict) and isinstance(facts.get("global batch"), int):
            return facts["global batch"]
    return None


def card_facts(card: str) -> Markup:
    """The model card's table of two columns."""
    rows = []
    for name, value in CARD_ROW.findall(card):
        rows.append((unescape_markdown(name), unescape_markdown(value)))
    return parts.facts(rows)


def read_if_present(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""
