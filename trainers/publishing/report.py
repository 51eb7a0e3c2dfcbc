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

from trainers.config import KINDS, AutoencoderConfig, Config, DataConfig, DreamBoothConfig, ImagesConfig, UNetConfig
from trainers.config.loading import parse, validate
from trainers.data.pictures import Picture, encoded, image_files, open_dataset
from trainers.errors import UserError
from trainers.publishing.charts import Row, curves, facts, gallery, headline, table, tiles
from trainers.run_folder import loads

SHOWN = 30  # training pictures


GRIDS = "samples/step-*/grid.png"


COST = ("images_per_second", "peak_memory_gib")


def write_report(run: Path, pictures: bool = True) -> Path:
    """Write what a run folder holds, finished or not, as one HTML file and return its path.

    pictures: show the training pictures. `report.html` has them and is its owner's; without them the file is
    `report_public.html`, which may be uploaded. Raises: UserError when `run` is no run folder.
    """
    try:
        text = (run / "config.yaml").read_text("utf-8")
        tree = parse(text)
    except (OSError, ValueError, yaml.YAMLError):
        text, tree = "", None
    if not isinstance(tree, dict) or tree.get("kind") not in KINDS:
        raise UserError(f"{run} is no run folder: it has no config.yaml with a kind ({', '.join(KINDS)})")
    config, _ = validate(tree)
    title, out = escape(run.resolve().name), run / ("report.html" if pictures else "report_public.html")
    body = f'<p class="kind">{config.kind}</p><h1>{title}</h1><p class="lead">{escape(described(config))}</p>'
    for name, part in sections(run, config, pictures).items():
        body += f"\n<section>{name and f'<h2>{name}</h2>'}{part}</section>" if part else ""
    body += f'\n<h2>Config</h2><details class="card"><summary>config.yaml</summary><pre>{escape(text)}</pre></details>'
    page = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    out.write_text(page.substitute(title=title, body=body), "utf-8")
    return out


def described(config: Config) -> str:
    """What was trained, in a line."""
    data = config.data
    if isinstance(config, DreamBoothConfig):
        what = f"A LoRA of rank {config.lora.rank} for" if config.lora else "All weights of"
        prompt = f", which learnt “{data.instance_prompt}”" if data.instance_prompt else ""
        return f"{what} {config.model.pretrained_model_name_or_path}{prompt}"
    name = {"gan": "A GAN", "autoencoder": "An autoencoder", "unet": "A U-Net"}[config.kind]
    name += f" ({config.use})" if isinstance(config, (AutoencoderConfig, UNetConfig)) else ""
    colour, source = "grey" if data.channels == 1 else "colour", Path(data.image_dir or data.dataset_name or "").name
    return f"{name} from nothing, on {colour} pictures of {data.resolution} pixels: {source}"


def sections(run: Path, config: Config, pictures: bool) -> dict[str, str]:
    """HTML by title, in order; empty where the run has nothing to show."""
    lines = [row for row in map(loads, read(run / "metrics.jsonl").splitlines()) if "step" in row]
    evaluation, figures = (loads(read(run / f"{name}.json")) for name in ("evaluation", "figures"))
    rows, strength, best = evaluation.get("rows", []), evaluation.get("strength", []), evaluation.get("best")
    chosen = next((row for row in reversed(rows) if best in (row["checkpoint"], None)), {})
    told = figures | {k: v for k, v in chosen.items() if k not in ("checkpoint", "step")} | evaluation
    sweep = table(strength) and f"<details><summary>As a table</summary>{table(strength)}</details>"
    spectrum = [{"rank": int(rank), "share": share} for rank, share in evaluation.get("spectrum", {}).items()]
    return {
        "": headline(told) + overview(run, config, lines),
        "Result": result(run, config),
        "Samples over time": slider(run.glob(GRIDS)),
        "Training": curves([{k: v for k, v in line.items() if k not in COST} for line in lines], "step"),
        "Fidelity": curves(rows, "step", best and chosen["step"]) + table(rows, best),
        "Strength of the LoRA": curves(strength, "scale") + sweep + slider(run.glob("evaluation/strength-*/grid.png")),
        "Share of the update by rank": curves(spectrum, "rank", evaluation.get("suggested_rank")),
        "Nearest training pictures": nearest(run, evaluation.get("memorisation", []), pictures),
        "Training pictures": sheet(config.data) if pictures else "",
        "Speed and memory": curves([{k: line[k] for k in ("step", *COST) if k in line} for line in lines], "step"),
        "Facts": facts(read(run / "README.md")),
    }


def overview(run: Path, config: Config, lines: Sequence[Row]) -> str:
    """How far the run came, and what its loop took in time and memory."""
    step, last = max((line["step"] for line in lines), default=0), config.train.max_train_steps
    shown: Row = {"steps": step if step == last else f"{step} of {last}"}
    speeds = [line["images_per_second"] for line in lines]
    states = [loads(read(path)) for path in sorted(run.glob("checkpoints/step-*/manifest.json"))]
    if speeds and states and states[-1]:
        spans = [b - a for a, b in pairwise([0, *(line["step"] for line in lines)])]
        images = states[-1]["facts"]["global batch"]
        seconds = sum(span * images / speed for span, speed in zip(spans, speeds, strict=True))
        shown["time"] = str(timedelta(seconds=round(seconds)))
    if lines:
        shown["images per second"] = median(speeds)
        shown["peak memory"] = f"{max(line['peak_memory_gib'] for line in lines):.3g} GiB"
    return tiles(shown) + ('<p class="state">not finished</p>' if step < last else "")


def result(run: Path, config: Config) -> str:
    """The final pictures by prompt, or else their grid unless the slider ends with it, and what else was drawn."""
    folder, steps = run / "samples" / "final", sorted(run.glob(GRIDS))
    prompts = config.validation.prompts if isinstance(config, DreamBoothConfig) else []
    files = ((prompt, sorted(folder.glob(f"{i:02d}-*.png"))) for i, prompt in enumerate(prompts))
    by_prompt = gallery([(prompt, [picture(path, 512) for path in paths]) for prompt, paths in files])
    known = [step.read_bytes() for step in steps[-1:]]
    others = (path for path in sorted(folder.glob("*.*")) if path.stem != "grid" or not by_prompt)
    paths = (path for path in others if "-" not in path.name and path.read_bytes() not in known)
    tags = [film(path) if path.suffix == ".gif" else picture(path, 1280, path.stem) for path in paths]
    return by_prompt + (f'<div class="plain">{"".join(tags)}</div>' if any(tags) else "")


def nearest(run: Path, pairs: Sequence[Row], pictures: bool) -> str:
    """The samples that are most like a training picture; beside it, if those may be shown."""
    groups, names = [], ("sample", "photo") if pictures else ("sample",)
    for pair in sorted(pairs, key=lambda pair: -pair["similarity"])[:8]:
        caption = f"similarity {pair['similarity']:.3f}" + (", a near copy" if pair.get("flagged") else "")
        groups.append((caption, [picture(run / pair[name], 384) for name in names]))
    return gallery(groups)


def slider(grids: Iterable[Path]) -> str:
    """Grids of folders such as step-000100, one at a time; without scripts the last one, on paper all."""
    found = {re.sub(r"-0*(?=\d)", " ", escape(grid.parent.name)): grid for grid in sorted(grids)}
    side = min(1280, max(400, 4000 // math.isqrt(len(found) or 1)))
    tags = [(name, tag) for name, grid in found.items() if (tag := picture(grid, side, name))]
    stack = "".join(f"<figure><figcaption>{name}</figcaption>{tag}</figure>" for name, tag in tags)
    control = f'<input type="range" min="0" max="{len(tags) - 1}" value="{len(tags) - 1}" aria-label="picture" hidden>'
    return f'<div class="frames">{control}<div class="stack">{stack}</div></div>' if tags else ""


def sheet(data: DataConfig | ImagesConfig) -> str:
    """At most SHOWN of the pictures, drawn at random, if their folder or local data set is still there."""
    dream, name, column = isinstance(data, DataConfig), data.dataset_name, data.image_column
    folder, split = (data.instance_data_dir, data.dataset_split) if dream else (data.image_dir, data.train_split)
    if not folder and not (name and Path(name).exists()):
        return ""
    try:
        rows = image_files(folder) if folder else open_dataset(name, split, {"image_column": column})
    except UserError:
        return ""
    chosen = sorted(random.Random(0).sample(range(len(rows)), min(len(rows), SHOWN)))
    reads = (rows[i].read_bytes if folder else partial(encoded, rows, i, column) for i in chosen)
    shown = "".join(picture(Picture("", read, ""), 192) for read in reads)
    return f'<p class="note">{len(chosen)} of {len(rows)}</p><div class="sheet">{shown}</div>' if shown else ""


def picture(source: Path | Picture, side: int, alt: str = "") -> str:
    """An <img> that holds its data, at most `side` pixels wide and high; nothing for a file that is broken or gone."""
    try:
        image = (source if isinstance(source, Picture) else Picture("", source.read_bytes, "")).decode()
    except UserError:
        return ""
    image.thumbnail((side, side))
    small, buffer = max(image.size) <= 96, io.BytesIO()
    image.save(buffer, "webp", lossless=small, quality=82)
    return tag(buffer, image.size, alt, ' class="pixels"' if small else "")


def film(path: Path) -> str:
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.save(buffer, "webp", save_all=True, duration=image.info["duration"], quality=70)
    except (OSError, EOFError):
        return ""
    return tag(buffer, image.size, path.stem)


def tag(webp: io.BytesIO, size: tuple[int, int], alt: str, look: str = "") -> str:
    place = 'width="{}" height="{}"'.format(*size) + look
    data = base64.b64encode(webp.getvalue()).decode()
    return f'<img alt="{escape(alt)}" {place} src="data:image/webp;base64,{data}">'


def read(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""
