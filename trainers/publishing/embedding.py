"""Pictures of a run, small enough to stand in the report's file itself."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from trainers.config import Config, DreamBoothConfig, ImagesConfig
from trainers.data.dataset_rows import open_dataset, read_encoded
from trainers.data.decoding import read_file
from trainers.data.folders import list_image_files
from trainers.data.pictures import Picture
from trainers.data.rng import choose_rows
from trainers.errors import UserError
from trainers.publishing.charts import Record
from trainers.publishing.html import parts
from trainers.run_folder import FINAL, GRID_NAME, SAMPLES, sample_grids

BASE_NAME = "step 0"
MAX_TRAINING_PICTURES = 30
MAX_NEAREST_PICTURES = 8
MAX_COLUMNS = 4
MAX_CACHED_PICTURES = 256
SMALL_SIDE = 96  # up to this side pictures are lossless and shown with their pixels


@dataclass(frozen=True)
class EmbeddedPicture:
    """A WebP picture as base64, for an <img> that holds its own data."""

    base64: str
    width: int
    height: int
    alt: str
    is_small: bool = False


def embed_picture(source: Path | Picture, side: int, alt: str = "") -> EmbeddedPicture | None:
    """The picture, at most `side` pixels wide and high; None for a file that is broken or gone."""
    if isinstance(source, Path):
        return embed_file(source, side, alt, source.stat().st_mtime_ns)
    return embed(source, side, alt)


@lru_cache(MAX_CACHED_PICTURES)
def embed_file(path: Path, side: int, alt: str, changed_at: int) -> EmbeddedPicture | None:
    """A picture that is embedded in page after page while its file stays as it is."""
    return embed(Picture("", path.read_bytes, ""), side, alt)


def embed(picture: Picture, side: int, alt: str) -> EmbeddedPicture | None:
    try:
        return embed_image(picture.decode(), side, alt)
    except UserError:
        return None


def embed_image(image: Image.Image, side: int, alt: str = "") -> EmbeddedPicture:
    """A picture in memory, which is made at most `side` pixels wide and high."""
    image.thumbnail((side, side))
    is_small = max(image.size) <= SMALL_SIDE
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=is_small, quality=82)
    return to_embedded(buffer, image.size, alt, is_small)


def embed_animation(path: Path) -> EmbeddedPicture | None:
    """A GIF that still moves; None for a file that is broken or gone."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.save(buffer, "webp", save_all=True, duration=image.info["duration"], quality=70)
    except (OSError, EOFError):
        return None
    return to_embedded(buffer, image.size, path.stem)


def to_embedded(
    webp: io.BytesIO, size: tuple[int, int], alt: str, is_small: bool = False
) -> EmbeddedPicture:
    return EmbeddedPicture(base64.b64encode(webp.getvalue()).decode(), *size, alt, is_small)


def embed_all(sources: Iterable[Path | Picture], side: int) -> list[EmbeddedPicture]:
    """Those of the pictures that can be read."""
    embedded = (embed_picture(source, side) for source in sources)
    return [picture for picture in embedded if picture]


def gallery(groups: Sequence[tuple[str, list[EmbeddedPicture]]]) -> Markup:
    """Captions and their pictures; a caption without pictures is left out."""
    visible = [(caption, pictures) for caption, pictures in groups if pictures]
    columns = max((len(pictures) for _, pictures in visible), default=0)
    return parts.gallery(visible, min(MAX_COLUMNS, columns))


def final_pictures(run: Path, config: Config) -> Markup:
    """The pictures of the finished run, by prompt where it has prompts.

    Their grid is left out where they stand by prompt, or where the slider ends with it.
    """
    folder = run / SAMPLES / FINAL
    samples = config.validation.samples if isinstance(config, DreamBoothConfig) else []
    groups = []
    for i, sample in enumerate(samples):
        groups.append((sample.caption, embed_all(sorted(folder.glob(f"{i:02d}-*.png")), 512)))
    by_prompt = gallery(groups)
    last_grids = [path.read_bytes() for path in sample_grids(run)[-1:]]
    others = []
    for path in sorted(folder.glob("*.*")):
        is_repeated_grid = path.name == GRID_NAME and bool(by_prompt)
        # a name with a dash is one of the pictures by prompt
        if is_repeated_grid or "-" in path.name or path.read_bytes() in last_grids:
            continue
        is_animated = path.suffix == ".gif"
        others.append(
            embed_animation(path) if is_animated else embed_picture(path, 1280, path.stem)
        )
    return by_prompt + parts.plain_pictures([picture for picture in others if picture])


def nearest_pictures(run: Path, pairs: Sequence[Record], pictures: bool) -> Markup:
    """The samples that resemble a training picture most, next to it if `pictures` allows that."""
    groups = []
    names = ("sample", "photo") if pictures else ("sample",)
    by_similarity = sorted(pairs, key=lambda pair: -pair["similarity"])
    for pair in by_similarity[:MAX_NEAREST_PICTURES]:
        caption = f"similarity {pair['similarity']:.3f}"
        if pair.get("flagged"):
            caption += ", a near copy"
        groups.append((caption, embed_all((run / pair[name] for name in names), 384)))
    return gallery(groups)


def slider(grids: Iterable[Path]) -> Markup:
    """Grids of folders such as step-000100, of which one at a time is shown, in this order.

    That of step 0, before anything was learned, stays beside them.
    """
    by_name = {}
    for grid in grids:
        # step-000100 becomes "step 100"
        by_name[re.sub(r"-0*(?=\d)", " ", grid.parent.name)] = grid
    # the more frames, the smaller each, or the file would grow without end
    side = min(1280, max(400, 4000 // math.isqrt(len(by_name) or 1)))
    frames = [embed_picture(grid, side, name) for name, grid in by_name.items()]
    shown = [frame for frame in frames if frame]
    base = shown.pop(0) if shown and shown[0].alt == BASE_NAME else None
    return parts.slider(shown, base)


def training_pictures(data: ImagesConfig) -> Markup:
    """Some of the training pictures, drawn at random.

    There are none where their folder or local data set is gone, or where they are on the Hub.
    """
    folder, name, column = data.train_dir, data.dataset_name, data.image_column
    if not folder and not (name and Path(name).exists()):
        return Markup()
    try:
        if folder:
            reads = [partial(read_file, path) for path in list_image_files(folder)]
        else:
            rows = open_dataset(name, data.train_split, {"image_column": column})
            reads = [partial(read_encoded, rows, i, column) for i in range(len(rows))]
    except UserError:
        return Markup()
    shown = choose_rows(0, len(reads), MAX_TRAINING_PICTURES)
    pictures = embed_all((Picture("", reads[i], "", data.bit_depth) for i in shown), 192)
    return parts.contact_sheet(pictures, len(shown), len(reads))
