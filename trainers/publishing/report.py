"""A run folder as one HTML file that needs nothing else: pictures, curves, figures, config."""

from __future__ import annotations

import base64
import io
import math
import random
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from string import Template

import yaml
from PIL import Image

from trainers.config import (
    KINDS,
    AutoencoderConfig,
    Config,
    DataConfig,
    DreamBoothConfig,
    ImagesConfig,
    UNetConfig,
)
from trainers.config.loading import parse_yaml, validate
from trainers.data.pictures import Picture, list_image_files, open_dataset, read_encoded
from trainers.errors import UserError
from trainers.publishing.charts import (
    Record,
    card_facts,
    gallery,
    html_table,
    line_charts,
    metric_summary,
    metric_tiles,
)
from trainers.run_folder import parse_json_line

MAX_TRAINING_PICTURES = 30  # training pictures


GRID_PATTERN = "samples/step-*/grid.png"


COST_METRICS = ("images_per_second", "peak_memory_gib")


def write_report(run: Path, pictures: bool = True) -> Path:
    """Write what a run folder holds, finished or not, as one HTML file and return its path.

    pictures: show the training pictures. `report.html` has them and is its owner's; without them
    the file is
    `report_public.html`, which may be uploaded. Raises: UserError when `run` is no run folder.
    """
    try:
        text = (run / "config.yaml").read_text("utf-8")
        tree = parse_yaml(text)
    except (OSError, ValueError, yaml.YAMLError):
        text, tree = "", None
    if not isinstance(tree, dict) or tree.get("kind") not in KINDS:
        raise UserError(
            f"{run} is no run folder: it has no config.yaml with a kind ({', '.join(KINDS)})"
        )
    config, _ = validate(tree)
    title, out = (
        escape(run.resolve().name),
        run / ("report.html" if pictures else "report_public.html"),
    )
    body = (
        f'<p class="kind">{config.kind}</p><h1>{title}</h1><p '
        f'class="lead">{escape(describe_run(config))}</p>'
    )
    for name, part in build_sections(run, config, pictures).items():
        body += f"\n<section>{name and f'<h2>{name}</h2>'}{part}</section>" if part else ""
    body += (
        f"\n<h2>Config</h2><details "
        f'class="card"><summary>config.yaml</summary><pre>{escape(text)}</pre></details>'
    )
    page = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    out.write_text(page.substitute(title=title, body=body), "utf-8")
    return out


def describe_run(config: Config) -> str:
    """What was trained, in a line."""
    data = config.data
    if isinstance(config, DreamBoothConfig):
        subject = f"A LoRA of rank {config.lora.rank} for" if config.lora else "All weights of"
        prompt = f", which learnt “{data.instance_prompt}”" if data.instance_prompt else ""
        return f"{subject} {config.model.pretrained_model_name_or_path}{prompt}"
    name = {"gan": "A GAN", "autoencoder": "An autoencoder", "unet": "A U-Net"}[config.kind]
    name += f" ({config.use})" if isinstance(config, (AutoencoderConfig, UNetConfig)) else ""
    color, source = (
        "grey" if data.channels == 1 else "colour",
        Path(data.image_dir or data.dataset_name or "").name,
    )
    return f"{name} from nothing, on {color} pictures of {data.resolution} pixels: {source}"


def build_sections(run: Path, config: Config, pictures: bool) -> dict[str, str]:
    """HTML by title, in order; empty where the run has nothing to show."""
    lines = [
        row
        for row in map(parse_json_line, read_if_present(run / "metrics.jsonl").splitlines())
        if "step" in row
    ]
    evaluation, metrics = (
        parse_json_line(read_if_present(run / f"{name}.json")) for name in ("evaluation", "figures")
    )
    rows, strength, best = (
        evaluation.get("rows", []),
        evaluation.get("strength", []),
        evaluation.get("best"),
    )
    best_row = next((row for row in reversed(rows) if best in (row["checkpoint"], None)), {})
    summary = (
        metrics
        | {k: v for k, v in best_row.items() if k not in ("checkpoint", "step")}
        | evaluation
    )
    sweep = (
        html_table(strength)
        and f"<details><summary>As a table</summary>{html_table(strength)}</details>"
    )
    spectrum = [
        {"rank": int(rank), "share": share}
        for rank, share in evaluation.get("spectrum", {}).items()
    ]
    return {
        "": metric_summary(summary) + overview(run, config, lines),
        "Result": final_pictures(run, config),
        "Samples over time": slider(run.glob(GRID_PATTERN)),
        "Training": line_charts(
            [{k: v for k, v in line.items() if k not in COST_METRICS} for line in lines], "step"
        ),
        "Fidelity": line_charts(rows, "step", best and best_row["step"]) + html_table(rows, best),
        "Strength of the LoRA": line_charts(strength, "scale")
        + sweep
        + slider(run.glob("evaluation/strength-*/grid.png")),
        "Share of the update by rank": line_charts(
            spectrum, "rank", evaluation.get("suggested_rank")
        ),
        "Nearest training pictures": nearest_pictures(
            run, evaluation.get("memorisation", []), pictures
        ),
        "Training pictures": training_pictures(config.data) if pictures else "",
        "Speed and memory": line_charts(
            [{k: line[k] for k in ("step", *COST_METRICS) if k in line} for line in lines], "step"
        ),
        "Facts": card_facts(read_if_present(run / "README.md")),
    }


def overview(run: Path, config: Config, lines: Sequence[Record]) -> str:
    """How far the run came, and what its loop took in time and memory."""
    step, last = max((line["step"] for line in lines), default=0), config.train.max_train_steps
    values: Record = {"steps": step if step == last else f"{step} of {last}"}
    speeds = [line["images_per_second"] for line in lines]
    states = [
        parse_json_line(read_if_present(path))
        for path in sorted(run.glob("checkpoints/step-*/manifest.json"))
    ]
    if speeds and states and states[-1]:
        spans = [b - a for a, b in pairwise([0, *(line["step"] for line in lines)])]
        images = states[-1]["facts"]["global batch"]
        seconds = sum(span * images / speed for span, speed in zip(spans, speeds, strict=True))
        values["time"] = str(timedelta(seconds=round(seconds)))
    if lines:
        values["images per second"] = median(speeds)
        values["peak memory"] = f"{max(line['peak_memory_gib'] for line in lines):.3g} GiB"
    return metric_tiles(values) + ('<p class="state">not finished</p>' if step < last else "")


def final_pictures(run: Path, config: Config) -> str:
    """The final pictures by prompt, or else their grid unless the slider ends with it, and what
    else was drawn."""
    folder, steps = run / "samples" / "final", sorted(run.glob(GRID_PATTERN))
    prompts = config.validation.prompts if isinstance(config, DreamBoothConfig) else []
    files = ((prompt, sorted(folder.glob(f"{i:02d}-*.png"))) for i, prompt in enumerate(prompts))
    by_prompt = gallery(
        [(prompt, [image_tag(path, 512) for path in paths]) for prompt, paths in files]
    )
    known = [step.read_bytes() for step in steps[-1:]]
    others = (path for path in sorted(folder.glob("*.*")) if path.stem != "grid" or not by_prompt)
    paths = (path for path in others if "-" not in path.name and path.read_bytes() not in known)
    tags = [
        gif_tag(path) if path.suffix == ".gif" else image_tag(path, 1280, path.stem)
        for path in paths
    ]
    return by_prompt + (f'<div class="plain">{"".join(tags)}</div>' if any(tags) else "")


def nearest_pictures(run: Path, pairs: Sequence[Record], pictures: bool) -> str:
    """The samples that are most like a training picture; beside it, if those may be shown."""
    groups, names = [], ("sample", "photo") if pictures else ("sample",)
    for pair in sorted(pairs, key=lambda pair: -pair["similarity"])[:8]:
        caption = f"similarity {pair['similarity']:.3f}" + (
            ", a near copy" if pair.get("flagged") else ""
        )
        groups.append((caption, [image_tag(run / pair[name], 384) for name in names]))
    return gallery(groups)


def slider(grids: Iterable[Path]) -> str:
    """Grids of folders such as step-000100, one at a time; without scripts the last one, on paper
    all."""
    grid_by_name = {
        re.sub(r"-0*(?=\d)", " ", escape(grid.parent.name)): grid for grid in sorted(grids)
    }
    side = min(1280, max(400, 4000 // math.isqrt(len(grid_by_name) or 1)))
    tags = [
        (name, tag) for name, grid in grid_by_name.items() if (tag := image_tag(grid, side, name))
    ]
    stack = "".join(f"<figure><figcaption>{name}</figcaption>{tag}</figure>" for name, tag in tags)
    control = (
        f'<input type="range" min="0" max="{len(tags) - 1}" value="{len(tags) - 1}" '
        f'aria-label="picture" hidden>'
    )
    return f'<div class="frames">{control}<div class="stack">{stack}</div></div>' if tags else ""


def training_pictures(data: DataConfig | ImagesConfig) -> str:
    """At most SHOWN of the pictures, drawn at random, if their folder or local data set is still
    there."""
    dream, name, column = isinstance(data, DataConfig), data.dataset_name, data.image_column
    folder, split = (
        (data.instance_data_dir, data.dataset_split)
        if dream
        else (data.image_dir, data.train_split)
    )
    if not folder and not (name and Path(name).exists()):
        return ""
    try:
        rows = (
            list_image_files(folder)
            if folder
            else open_dataset(name, split, {"image_column": column})
        )
    except UserError:
        return ""
    rows_shown = sorted(
        random.Random(0).sample(range(len(rows)), min(len(rows), MAX_TRAINING_PICTURES))
    )
    reads = (
        rows[i].read_bytes if folder else partial(read_encoded, rows, i, column) for i in rows_shown
    )
    tags = "".join(image_tag(Picture("", read, ""), 192) for read in reads)
    return (
        f'<p class="note">{len(rows_shown)} of {len(rows)}</p><div class="sheet">{tags}</div>'
        if tags
        else ""
    )


def image_tag(source: Path | Picture, side: int, alt: str = "") -> str:
    """An <img> that holds its data, at most `side` pixels wide and high; nothing for a file that is
    broken or gone."""
    try:
        image = (
            source if isinstance(source, Picture) else Picture("", source.read_bytes, "")
        ).decode()
    except UserError:
        return ""
    image.thumbnail((side, side))
    small, buffer = max(image.size) <= 96, io.BytesIO()
    image.save(buffer, "webp", lossless=small, quality=82)
    return html_image(buffer, image.size, alt, ' class="pixels"' if small else "")


def gif_tag(path: Path) -> str:
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.save(buffer, "webp", save_all=True, duration=image.info["duration"], quality=70)
    except (OSError, EOFError):
        return ""
    return html_image(buffer, image.size, path.stem)


def html_image(webp: io.BytesIO, size: tuple[int, int], alt: str, attributes: str = "") -> str:
    size_attributes = 'width="{}" height="{}"'.format(*size) + attributes
    data = base64.b64encode(webp.getvalue()).decode()
    return f'<img alt="{escape(alt)}" {size_attributes} src="data:image/webp;base64,{data}">'


def read_if_present(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""
