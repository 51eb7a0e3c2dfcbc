"""Captions of the pictures in a folder: text files beside them, and metadata.jsonl or metadata.csv.

Names are compared after Unicode normalization and case folding, an exact name first. What belongs
to no picture is an error that names it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainers.data.decoding import UnreadablePictureError, read_file
from trainers.data.folders import FolderContents, relative_name
from trainers.errors import UserError, name_some

# unless the config names one, the first of these columns that a metadata file has is read
CAPTION_COLUMNS = ("text", "caption", "prompt")
Lines = Literal["join", "choose"]  # what the lines of one text are, as data.caption_lines says
MAX_TEXT_BYTES = 2**26
EXAMPLE_LINE = '{"file_name": "1.jpg", "text": "a caption"}'
# the marks at the beginning of a file, the longer ones first
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass
class FolderCaptions:
    """The captions of each picture that has its own, and notes on what was not taken.

    sources: which file a picture's captions stand in.
    """

    by_picture: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[Path, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, picture: Path, captions: tuple[str, ...], source: Path) -> None:
        """Raises: UserError where another place has other ones."""
        if self.by_picture.get(picture, captions) != captions:
            both = f"{self.sources[picture].name} and {source.name}"
            raise UserError(f"{picture} has two captions, in {both}: remove one of them")
        self.by_picture[picture], self.sources[picture] = captions, source


class PictureIndex:
    """The pictures of a folder by their names within it, with and without their endings."""

    def __init__(self, contents: FolderContents) -> None:
        self.by_name: dict[str, list[tuple[str, Path]]] = {}
        self.by_stem: dict[str, list[tuple[str, Path]]] = {}
        for path in contents.pictures:
            name = relative_name(path, contents.root)
            stem = name[: len(name) - len(path.suffix)]
            self.by_name.setdefault(fold_name(name), []).append((name, path))
            self.by_stem.setdefault(fold_name(stem), []).append((stem, path))

    def with_name(self, name: str) -> list[Path]:
        return self.choose(self.by_name, name)

    def with_stem(self, name: str) -> list[Path]:
        """Pictures named `name` and an ending."""
        return self.choose(self.by_stem, name)

    @staticmethod
    def choose(index: dict[str, list[tuple[str, Path]]], name: str) -> list[Path]:
        """Those with exactly this name, else those with one that is alike."""
        similar = index.get(fold_name(name), [])
        exact = [path for other, path in similar if other == name]
        return exact or [path for _, path in similar]


def fold_name(name: str) -> str:
    """One text for names that differ in case, or in how accents are encoded, alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_captions(
    contents: FolderContents, column: str | None = None, lines: Lines = "join"
) -> FolderCaptions:
    """A picture's captions are the text file beside it, else its line of metadata.

    column: of metadata, instead of the first of `CAPTION_COLUMNS`. Raises: UserError naming what
    is not text, is empty, or belongs to no picture.
    """
    index, captions = PictureIndex(contents), FolderCaptions()
    read_sidecars(contents, index, captions, lines)
    if column and not contents.metadata:
        raise UserError(
            f"data.caption_column is {column!r}, and {contents.root} has neither metadata.jsonl "
            "nor metadata.csv with such a column: add one, or set data.caption_column to null"
        )
    from_metadata = FolderCaptions()
    for path in contents.metadata:
        read_metadata(path, contents, index, from_metadata, column, lines)
    hidden = from_metadata.by_picture.keys() & captions.by_picture.keys()
    if hidden:
        names = sorted(relative_name(path, contents.root) for path in hidden)
        captions.notes.append(
            f"a text file and metadata: the text file is used ({name_some(names)})"
        )
    captions.by_picture = from_metadata.by_picture | captions.by_picture
    captions.sources = from_metadata.sources | captions.sources
    captions.notes += from_metadata.notes
    return captions


def read_sidecars(
    contents: FolderContents, index: PictureIndex, captions: FolderCaptions, lines: Lines
) -> None:
    """Add the captions of 1.txt, 1.caption and 1.jpg.txt. Raises: UserError for orphans."""
    orphans = []
    for path in contents.sidecars:
        name = relative_name(path.with_suffix(""), contents.root)
        owners = index.with_stem(name) or index.with_name(name)
        if not owners:
            orphans.append(relative_name(path, contents.root))
            continue
        written = split_lines(read_text(path))
        if not written:
            raise UserError(
                f"{path} is empty: write a caption, or remove the file if data.instance_prompt is "
                "meant"
            )
        for owner in owners:
            captions.add(owner, written if lines == "choose" else (" ".join(written),), path)
    if orphans:
        raise UserError(
            f"{contents.root}: no picture belongs to {name_some(orphans)}: a caption has the name "
            "of its picture; rename or remove what is none"
        )


def split_lines(text: str) -> tuple[str, ...]:
    """The lines that are not empty, without the spaces around them."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def read_metadata(  # noqa: PLR0913 (all that the rows of a file are read by)
    path: Path,
    contents: FolderContents,
    index: PictureIndex,
    captions: FolderCaptions,
    column: str | None,
    lines: Lines,
) -> None:
    """Add the captions of one metadata file, whose names are relative to its folder."""
    rows = list(read_rows(path))
    column = choose_column(path, rows, column, captions)
    folder, unmatched = relative_name(path.parent, contents.root), []
    for number, row in rows:
        name, caption = row.get("file_name"), row.get(column)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}, line {number}: not like {EXAMPLE_LINE} (no file_name)")
        owners = index.with_name(normalize_path(folder, name))
        if not owners:
            unmatched.append(f"{name} (line {number})")
        if caption is None:
            continue
        several = parse_captions(caption, f"{path}, line {number}: {column!r}", lines)
        for owner in owners:
            captions.add(owner, several, path)
    if unmatched:
        raise UserError(
            f"{path}: there is no picture {name_some(unmatched)}: file_name is relative to "
            f"{path.parent}; mend the names, or remove the lines"
        )


def choose_column(
    path: Path,
    rows: Sequence[tuple[int, dict]],
    column: str | None,
    captions: FolderCaptions,
) -> str:
    """The column that holds the captions. Raises: UserError where there is none."""
    names = dict.fromkeys(key for _, row in rows for key in row)
    others = ", ".join(names)
    if column:
        if column not in names:
            raise UserError(f"data.caption_column: {path} has no {column!r}, it has {others}")
        return column
    known = [name for name in CAPTION_COLUMNS if name in names]
    if not known:
        raise UserError(
            f"{path} has none of the columns {', '.join(CAPTION_COLUMNS)}: set data.caption_column "
            f"to the one that holds the captions, of {others or 'which there is none'}"
        )
    if len(known) > 1:
        captions.notes.append(
            f"captions are {path.name}'s {known[0]!r}, not its {' or '.join(map(repr, known[1:]))}"
        )
    return known[0]


def parse_captions(value: object, what: str, lines: Lines) -> tuple[str, ...]:
    """The captions of a value, which is one text or a list of them.

    Raises: UserError for one that is not text, or is empty.
    """
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{what} is {text!r}, which is not text")
        if not text.strip():
            raise UserError(f"{what} is empty: write a caption, or leave it out")
    if not texts:
        raise UserError(f"{what} is an empty list: write a caption, or leave it out")
    if lines == "choose" and not isinstance(value, list):
        return split_lines(value)
    return tuple(text.strip() for text in texts)


def normalize_path(folder: str, name: str) -> str:
    """A file name of metadata as a path within the picture folder, with forward slashes."""
    return posixpath.normpath(posixpath.join(folder, name.strip().replace("\\", "/")))


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """The lines of a metadata file with their numbers. Raises: UserError naming a broken one."""
    text = read_text(path)
    yield from read_csv(path, text) if path.suffix.lower() == ".csv" else read_jsonl(path, text)


def read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    # not splitlines(), which also splits at characters that JSON allows within a text
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"not like {EXAMPLE_LINE} ({error})"
            raise UserError(f"{path}, line {number}: {reason}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not like {EXAMPLE_LINE}")
        yield number, row


def read_csv(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    """Separated by commas, semicolons or tabs, as its first line is."""
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        if "file_name" not in names:
            has = f"it has {', '.join(names)}" if names else "it is empty"
            raise UserError(f"{path} has no column file_name in its first line: {has}")
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error("it has another number of fields than the first line")
            # an empty field is a missing one
            yield reader.line_num, {key: value or None for key, value in row.items()}
    except csv.Error as error:
        number = reader.reader.line_num
        raise UserError(f"{path}, line {number}: not a line of CSV ({error})") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its mark. Raises: UserError."""
    try:
        data = read_file(path, MAX_TEXT_BYTES)
    except UnreadablePictureError as error:
        raise UserError(f"{path} {error}") from None
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path} is not UTF-8 text (it holds zero bytes): save it as UTF-8")
    return text
