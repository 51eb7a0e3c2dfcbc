"""What a folder with pictures holds: pictures, captions, and files that are not used."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainers.data.decoding import IMAGE_SUFFIXES
from trainers.errors import UserError
from trainers.run_folder import LOCK_NAME

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
# texts about a folder that are no captions
ABOUT_FOLDER = {"readme", "license", "licence", "copying"}
# what file managers and archives leave behind; so are names that begin with a dot
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"}
# beside class pictures that a run drew stands what they were drawn from
CLASS_PICTURES_FILE = re.compile(r"class-pictures(-[0-9a-f]{8})?\.json")
# kohya's scripts read the number before the underscore as how often each picture counts
KOHYA_FOLDER = re.compile(r"(\d{1,3})_(.*)")


@dataclass
class FolderContents:
    """The files of a folder and its sub-folders, each list in the order of their names.

    ignored: what the system or a run has put there, folders too.
    """

    root: Path
    pictures: list[Path] = field(default_factory=list)
    sidecars: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)
    skipped_folders: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)

    @property
    def picture_folders(self) -> list[Path]:
        """The sub-folders that pictures lie in."""
        return sorted({path.parent for path in self.pictures} - {self.root})

    def add(self, path: Path) -> None:
        suffix, stem = path.suffix.lower(), path.stem.lower()
        if suffix in IMAGE_SUFFIXES:
            self.pictures.append(path)
        elif path.name.lower() in METADATA_NAMES:
            self.metadata.append(path)
        elif suffix in CAPTION_SUFFIXES and stem not in ABOUT_FOLDER:
            self.sidecars.append(path)
        else:
            self.unused.append(path)


def scan_folder(root: Path, other_folders: Collection[Path | None] = ()) -> FolderContents:
    """Everything in a folder; nothing where there is none.

    other_folders: those of the config, which are left out where they lie in this one. Raises:
    UserError for a sub-folder that cannot be read.
    """
    contents = FolderContents(root)
    if root.is_dir():
        left_out = {path.resolve() for path in other_folders if path is not None}
        for path in sorted(walk(root, left_out, {root.resolve()}, contents)):
            contents.add(path)
    return contents


def walk(
    folder: Path, left_out: set[Path], seen: set[Path], contents: FolderContents
) -> Iterator[Path]:
    """The files in a folder and below; what is passed over is added to `contents`.

    seen: folders that links must not lead to again.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from None
    for entry in entries:
        path = Path(entry.path)
        if is_no_users_file(entry.name):
            contents.ignored.append(path)
            continue
        # unlike the entry's, it takes a link to itself for no folder
        if not path.is_dir():
            yield path
            continue
        target = path.resolve()
        if target in left_out or (path / LOCK_NAME).is_file():
            contents.skipped_folders.append(path)
        elif target not in seen:
            seen.add(target)
            yield from walk(path, left_out, seen, contents)


def is_no_users_file(name: str) -> bool:
    is_of_system = name.startswith(".") or name.lower() in SYSTEM_NAMES
    return is_of_system or bool(CLASS_PICTURES_FILE.fullmatch(name))


def list_image_files(folder: Path) -> list[Path]:
    """The pictures of a folder and its sub-folders, by their endings."""
    return scan_folder(folder).pictures


def collect_image_files(paths: Sequence[Path]) -> list[Path]:
    """Pictures, and those in folders. Raises: UserError for a place that is or holds none."""
    result = []
    for path in paths:
        result += (images := [path] if path.is_file() else list_image_files(path))
        if not images:
            raise UserError(f"{path} is no picture and no folder with pictures")
    return result


def kohya_repeats(path: Path, root: Path) -> tuple[int, str | None]:
    """How often a picture counts by the name of its folder, and the caption that this gives.

    A folder such as "10_sks dog" says both, of all that is in it; others count once and give none.
    Raises: UserError for 0.
    """
    folders = path.relative_to(root).parents
    match = next(filter(None, (KOHYA_FOLDER.fullmatch(folder.name) for folder in folders)), None)
    if not match:
        return 1, None
    repeats, caption = int(match[1]), match[2].strip()
    if repeats == 0:
        raise UserError(
            f"{match[0]}: the number before the underscore is how often each of its pictures "
            "counts, and 0 leaves them out: rename the folder"
        )
    return repeats, caption or None


def relative_name(path: Path | str, root: Path) -> str:
    """A file's name within a folder, or all of it where it lies elsewhere."""
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError:
        return str(path)
