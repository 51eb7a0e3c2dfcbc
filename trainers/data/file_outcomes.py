"""What becomes of every file in the folders with photos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.data.captions import FolderCaptions
from trainers.data.folders import FolderContents, relative_name
from trainers.data.intake import Intake, advice_for

NOT_READ = "not read: a folder of a run, or one that stands elsewhere in the config"


@dataclass(frozen=True)
class FileOutcome:
    """folder: the name of the one that was read; name: within it; is_problem: whether it should be
    looked at."""

    folder: str
    name: str
    outcome: str
    is_problem: bool = False


def describe_files(intake: Intake, uses: Mapping[str, str]) -> list[FileOutcome]:
    """Every file of the folders that an intake has read, in the order of their names.

    uses: what the pictures that are used are used for, by their names.
    """
    outcomes = []
    for contents, captions in intake.folders:
        of_folder = list(describe_contents(contents, captions, intake, uses))
        outcomes += sorted(of_folder, key=lambda outcome: outcome.name)
    return list(dict.fromkeys(outcomes))


def describe_contents(
    contents: FolderContents,
    captions: FolderCaptions,
    intake: Intake,
    uses: Mapping[str, str],
) -> Iterator[FileOutcome]:
    def outcome(path: Path, text: str, is_problem: bool = False) -> FileOutcome:
        name = relative_name(path, contents.root)
        if reason := intake.left_out.get(str(path)):
            # the name stands beside it
            text, is_problem = f"not used: {reason.replace(str(path), name)}", True
        return FileOutcome(contents.root.name, name, text, is_problem)

    for path in contents.pictures:
        yield outcome(path, uses.get(str(path), "not used"))
    owners: dict[Path, list[str]] = {}
    for picture, source in captions.sources.items():
        owners.setdefault(source, []).append(relative_name(picture, contents.root))
    for path in contents.sidecars:
        of = ", ".join(owners.get(path, []))
        yield outcome(path, f"caption of {of}" if of else "not used")
    for path in contents.metadata:
        yield outcome(path, f"captions of {len(owners.get(path, []))} pictures")
    for path in contents.unused:
        advice = advice_for(path)
        text = f"not used: {advice}" if advice else "not used"
        yield outcome(path, text, is_problem=advice is not None)
    others = (
        (contents.masks, "a mask"),
        (contents.skipped_folders, NOT_READ),
        (contents.ignored, "ignored: of the system, or hidden, or of a run"),
    )
    for paths, text in others:
        for path in paths:
            yield outcome(path, text)
