"""What a run found in the user's data, what it made of it, and what it left out: a few lines at the
start, and INTAKE_NAME in the run folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from trainers.config import TrainConfig
from trainers.data.captions import FolderCaptions
from trainers.data.decoding import IMAGE_SUFFIXES, read_file, read_storage
from trainers.data.folders import FolderContents, relative_name
from trainers.data.picture_memory import PictureMemory
from trainers.errors import UserError, name_some, warn_on_error

if TYPE_CHECKING:
    from trainers.data.pictures import Picture

Value = TypeVar("Value")

INTAKE_NAME = "intake.json"
MAX_EXAMINED_BYTES = 2**26  # of a file that does not say what it is
# endings of files that someone may have meant to be used, and what to do
MEANT_FOR_USE = {
    "save them as JPEG or PNG": "arw cr2 cr3 dng eps jp2 jxl nef orf pdf psd raf raw rw2 svg tga",
    "pictures are not taken out of such files": "avi mkv mov mp4 rar tar webm zip",
    "captions stand in a .txt beside each picture, in metadata.jsonl or in metadata.csv": (
        "cap csv json jsonl parquet tsv xml"
    ),
}
NOT_USED = "not used: "
UNNAMED_PICTURE = "they hold pictures and need the ending of their format"


@dataclass(frozen=True)
class Note:
    level: Literal["note", "warning", "error"]
    text: str


@dataclass
class Intake:
    """Notes and warnings about the data; strict: warnings end the run (data.strict).

    keeps_going: the first error does not end the reading, for all are to be shown; left_out: the
    reasons by the names of files that are not used; folders: what was found in each that was read;
    memory: what is known of its pictures.
    """

    strict: bool = False
    keeps_going: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    folders: list[tuple[FolderContents, FolderCaptions]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    num_reported: int = 0
    concept: str = ""  # what is told is about
    memory: PictureMemory = field(default_factory=PictureMemory)

    def note(self, text: str) -> None:
        self.add(Note("note", text))

    def warn(self, text: str) -> None:
        self.add(Note("warning", text))

    def fail(self, error: UserError, names: Iterable[str] = ()) -> None:
        """Raise an error, or note it and the files that it is about."""
        if not self.keeps_going:
            raise error
        self.add(Note("error", str(error)))
        self.left_out |= dict.fromkeys(names, str(error))

    def attempt(
        self, call: Callable[[], Value], fallback: Value, names: Iterable[str] = ()
    ) -> Value:
        """What `call` gives; the fallback where it raises an error, about files of these names,
        that is noted. Raises: UserError, as `fail`."""
        try:
            return call()
        except UserError as error:
            self.fail(error, names)
        return fallback

    def add(self, note: Note) -> None:
        """Add what was not said before."""
        if self.concept:
            note = replace(note, text=f"{self.concept}: {note.text}")
        if note not in self.notes:
            self.notes.append(note)

    @contextmanager
    def about(self, concept: str) -> Iterator[None]:
        """Whatever is noted or wrong inside begins with the name of the concept, if it has one."""
        self.concept, before = concept, self.concept
        try:
            yield
        except UserError as error:
            raise UserError(f"{concept}: {error}" if concept else str(error)) from None
        finally:
            self.concept = before

    def report(self, write: Callable[[str], None]) -> None:
        """Write what is new, a line each. Raises: UserError for warnings when `strict`."""
        new, self.num_reported = self.notes[self.num_reported :], len(self.notes)
        for note in new:
            write(f"data: {'warning: ' * (note.level == 'warning')}{note.text}")
        warnings = [note.text for note in new if note.level == "warning"]
        if self.strict and warnings:
            lines = "\n  ".join(warnings)
            raise UserError(f"data.strict is true, and there are warnings:\n  {lines}")

    def save(self, folder: Path) -> None:
        """Write all notes to INTAKE_NAME in a run folder, as a list of objects.

        A failure is a warning.
        """
        text = json.dumps([asdict(note) for note in self.notes], indent=2, ensure_ascii=False)
        temporary = folder / f".{INTAKE_NAME}"
        with warn_on_error(f"writing {folder / INTAKE_NAME}"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(text + "\n", "utf-8")
                temporary.replace(folder / INTAKE_NAME)
            finally:
                temporary.unlink(missing_ok=True)

    def describe_folder(
        self, contents: FolderContents, captions: FolderCaptions, pictures: Sequence[Picture]
    ) -> None:
        """Note the pictures of a folder, where their captions stand, and what is not used."""
        self.folders.append((contents, captions))
        sources: Counter[str] = Counter()
        for path, picture in zip(contents.pictures, pictures, strict=True):
            source = captions.sources.get(path)
            if source is not None:
                sources[f"by {source.name if source in contents.metadata else 'text files'}"] += 1
            else:
                sources["missing" if picture.caption is None else "by prompt"] += 1
        counts = ", ".join(f"{count} {name}" for name, count in sources.items())
        found = f"{len(contents.pictures)} pictures in {contents.root.name}"
        self.note(f"{found}, captions: {counts}" if counts else found)
        for note in captions.notes:
            self.note(note)
        repeats = {}
        for path, picture in zip(contents.pictures, pictures, strict=True):
            repeats[path.parent.name] = picture.repeats
        if len({*repeats.values()}) > 1:
            counted = ", ".join(f"{name}: {number}" for name, number in repeats.items())
            self.note(f"how often each picture of a folder counts: {counted}")
        self.describe_unused(contents)

    def describe_unused(self, contents: FolderContents) -> None:
        """Note sub-folders, and what in a folder is not used."""
        root = contents.root
        if folders := [relative_name(path, root) for path in contents.picture_folders]:
            self.note(f"pictures of sub-folders are used: {name_some(folders)}")
        if skipped := [relative_name(path, root) for path in contents.skipped_folders]:
            self.note(
                f"sub-folders that are not read, because they are a run's, or stand elsewhere in "
                f"the config: {name_some(skipped)}"
            )
        groups: dict[str | None, list[Path]] = {}
        for path in contents.unused:
            groups.setdefault(advice_for(path), []).append(path)
        for advice, paths in groups.items():
            text = f"{NOT_USED}{name_by_kind(paths, root)}"
            if advice:
                self.warn(f"{text}: {advice}")
            else:
                self.note(text)


def read_notes(run: Path) -> list[str]:
    """The texts that `Intake.save` left in a run folder; [] where it left none."""
    try:
        notes = json.loads((run / INTAKE_NAME).read_bytes())
    except (OSError, ValueError):
        return []
    return [note["text"] for note in notes]


def advice_for(path: Path) -> str | None:
    """What to do with a file that someone may have meant to be used; None for others."""
    for advice, suffixes in MEANT_FOR_USE.items():
        if path.suffix[1:].lower() in suffixes.split():
            return advice
    is_unnamed = path.suffix.lower() not in IMAGE_SUFFIXES and is_picture_by_content(path)
    return UNNAMED_PICTURE if is_unnamed else None


def check_batch_size(
    intake: Intake, train: TrainConfig, num_processes: int, num_pictures: int
) -> None:
    rows = train.train_batch_size * train.gradient_accumulation_steps * num_processes
    if rows > num_pictures:
        intake.warn(
            f"a step learns from {rows} pictures (train.train_batch_size x "
            f"train.gradient_accumulation_steps x processes), and there are {num_pictures}: some "
            "come more than once in each step"
        )


def is_picture_by_content(path: Path) -> bool:
    try:
        read_storage(read_file(path, MAX_EXAMINED_BYTES))
    except Exception:  # decoders raise whatever a file leads them to
        return False
    return True


def name_by_kind(paths: Sequence[Path], root: Path) -> str:
    """Files counted by their endings, and some of their names."""
    kinds = Counter(path.suffix.lower() or "without ending" for path in paths)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{counts} ({name_some([relative_name(path, root) for path in paths])})"
