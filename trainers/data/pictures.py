"""Pictures and captions from a folder or the `datasets` library, and the order in which training
visits them."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from trainers.config import DataConfig
from trainers.errors import UserError

if TYPE_CHECKING:
    import datasets


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Picture:
    """One picture: its name for messages, a way to read its encoded bytes, its caption."""

    name: str
    read: Callable[[], bytes]
    caption: str

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    @property
    def is_grayscale(self) -> bool:
        """Whether it is stored without colours."""
        with Image.open(io.BytesIO(self.read())) as image:
            return image.mode in ("1", "L", "LA", "I", "I;16", "F")

    def decode(self) -> Image.Image:
        """RGB, upright (EXIF), on white where it was transparent. Raises: UserError naming a broken
        file."""
        try:
            with Image.open(io.BytesIO(self.read())) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits, which convert() would clip
                    image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
                if image.has_transparency_data:
                    image = Image.alpha_composite(
                        Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                    )
                return image.convert("RGB")
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise UserError(
                f"{self.name} is not a readable picture ({error}): mend or remove it"
            ) from None


def load_instance_pictures(config: DataConfig) -> list[Picture]:
    """The pictures to learn, each decoded once as a check. Raises: UserError for none, broken or
    uncaptioned ones."""
    folder, prompt = config.instance_data_dir, config.instance_prompt
    pictures = (
        pictures_from_dataset(config)
        if config.dataset_name
        else pictures_from_folder(folder, prompt, config.caption_column)
    )
    return keep_readable(
        pictures, config.skip_corrupt, config.dataset_name or str(config.instance_data_dir)
    )


def load_held_out_pictures(config: DataConfig) -> list[Picture]:
    """Photos of the subject that are only measured on. Raises: UserError, as
    `load_instance_pictures`."""
    pictures = pictures_from_folder(config.held_out_dir, config.instance_prompt)
    return keep_readable(pictures, config.skip_corrupt, str(config.held_out_dir))


def load_class_pictures(
    folder: Path, config: DataConfig, names: Container[str] | None = None
) -> list[Picture]:
    """The first `num_class_images` pictures of the class folder; without captions of their own they
    have the prompt.

    names: the file names of those that may be taken, if not all.
    """
    pictures = pictures_from_folder(folder, config.class_prompts[0])
    allowed = [p for p in pictures if names is None or Path(p.name).name in names]
    return keep_readable(allowed[: config.num_class_images], config.skip_corrupt, str(folder))


def list_image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."
    )


def collect_image_files(paths: Sequence[Path]) -> list[Path]:
    """Pictures, and those in folders. Raises: UserError for a place that is or holds none."""
    result = []
    for path in paths:
        result += (images := [path] if path.is_file() else list_image_files(path))
        if not images:
            raise UserError(f"{path} is no picture and no folder with pictures")
    return result


def pictures_from_folder(
    folder: Path, prompt: str | None, column: str | None = None
) -> list[Picture]:
    """A picture's caption is the .txt beside it, else its line in metadata.jsonl, else `prompt`."""
    captions = read_metadata(folder / "metadata.jsonl", column)
    pictures = []
    for path in list_image_files(folder):
        caption_file = path.with_suffix(".txt")
        caption = (
            read_text(caption_file).strip()
            if caption_file.is_file()
            else captions.get(path.name, prompt)
        )
        pictures.append(Picture(str(path), path.read_bytes, caption))
    return check_captions(pictures)


def check_captions(pictures: list[Picture]) -> list[Picture]:
    """Raises: UserError naming pictures without a caption."""
    uncaptioned = [Path(picture.name).name for picture in pictures if picture.caption is None]
    if uncaptioned:
        raise UserError(
            f"no caption for {', '.join(uncaptioned[:5])}: set data.instance_prompt, or put a "
            f".txt beside each"
        )
    return pictures


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None


def read_metadata(path: Path, column: str | None) -> dict[str, str]:
    """File name -> caption, from lines such as {"file_name": "1.jpg", "text": "a dog"}; {} without
    the file."""
    if not path.is_file():
        return {}
    captions, columns = {}, set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            columns |= row.keys()
            name, caption = row["file_name"], row.get(column or "text")
            if caption is not None:
                captions[name] = caption.strip()
        except (ValueError, KeyError, AttributeError) as error:
            example = '{"file_name": "1.jpg", "text": "a caption"}'
            raise UserError(f"{path}, line {number}: not like {example} ({error})") from None
    if column and column not in columns:
        raise UserError(
            f"data.caption_column: {path} has no {column!r}, it has {', '.join(sorted(columns))}"
        )
    return captions


def pictures_from_dataset(config: DataConfig) -> list[Picture]:
    """Each row is read when it is wanted, for such a set may be large."""
    if config.caption_column is None and config.instance_prompt is None:
        raise UserError("no captions: set data.caption_column or data.instance_prompt")
    name, column = config.dataset_name, config.image_column
    rows = open_dataset(
        name,
        config.dataset_split,
        {"image_column": column, "caption_column": config.caption_column},
    )
    captions = rows[config.caption_column] if config.caption_column else [None] * len(rows)
    captions = [config.instance_prompt if caption is None else caption for caption in captions]
    pictures = [
        Picture(f"{name}[{i}]", partial(read_encoded, rows, i, column), text)
        for i, text in enumerate(captions)
    ]
    return check_captions(pictures)


def open_dataset(name: str, split: str, columns: dict[str, str | None]) -> datasets.Dataset:
    """A Hub data set, a local folder that `datasets` can read, or a .parquet file, its pictures
    left encoded.

    columns: keys of the config and the columns that they name, if any, the picture's first. Raises:
    UserError.
    """
    import datasets

    try:
        if name.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files={split: name}, split=split)
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise UserError(
            f"data.dataset_name: cannot load {name!r}, split {split!r} ({error})"
        ) from error
    for key, column in columns.items():
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"data.{key}: {name} has no column {column!r}, it has "
                f"{', '.join(rows.column_names)}"
            )
    return rows.cast_column(next(iter(columns.values())), datasets.Image(decode=False))


def read_encoded(rows: datasets.Dataset, i: int, column: str) -> bytes:
    """A data set's undecoded picture; a row without one gives no bytes, which is a broken
    picture."""
    image = rows[i][column] or {"bytes": b""}
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def keep_readable(pictures: list[Picture], skip_corrupt: bool, source: str) -> list[Picture]:
    """Those that decode. Raises: UserError for the first that does not (unless skipped), or when
    none is left."""

    def decoding_error(picture: Picture) -> UserError | None:
        try:
            picture.decode()
        except UserError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(decoding_error, pictures))
    for error in filter(None, errors):
        if not skip_corrupt:
            raise UserError(f"{error}, or set data.skip_corrupt=true")
        warnings.warn(f"skipped: {error}", stacklevel=2)
    result = [picture for picture, error in zip(pictures, errors, strict=True) if error is None]
    if not result:
        raise UserError(f"{source} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return result
