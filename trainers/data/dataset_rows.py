"""Rows of the `datasets` library, their pictures left encoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config import DataConfig
from trainers.data.captions import parse_captions
from trainers.data.decoding import UnreadablePictureError, read_file
from trainers.errors import UserError

if TYPE_CHECKING:
    import datasets

# the library's reader of folders: only its rows name files, which it has listed itself
FOLDER_BUILDER = "imagefolder"


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
    key, column = next(iter(columns.items()))
    try:
        return rows.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of the library's table format, which has many
        raise UserError(
            f"data.{key}: the column {column!r} of {name} holds no pictures ({error})"
        ) from error


def read_row_captions(rows: datasets.Dataset, config: DataConfig) -> Iterator[tuple[str, ...]]:
    """Of each row its captions, none where it has none. Raises: UserError for what is not text."""
    column = config.caption_column
    values = rows[column] if column else [None] * len(rows)
    for i, value in enumerate(values):
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            yield ()
        else:
            what = f"data.caption_column: {config.dataset_name}[{i}] in {column!r}"
            yield parse_captions(value, what, config.caption_lines)


def read_encoded(rows: datasets.Dataset, i: int, column: str) -> bytes:
    """A data set's undecoded picture; a row without one gives no bytes, which is a broken
    picture.

    Raises: UnreadablePictureError for a row that names a file instead, which may be any file of
    this machine, unless the data set is a folder of pictures.
    """
    image = rows[i][column] or {"bytes": b""}
    if image["bytes"] is not None:
        return image["bytes"]
    if rows.info.builder_name != FOLDER_BUILDER:
        raise UnreadablePictureError(
            "names a file instead of holding a picture, and files outside of the data set are not "
            "read: write the data set with the pictures in it"
        )
    return read_file(Path(image["path"]))
