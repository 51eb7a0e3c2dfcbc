"""Captions of a folder in which some caption files have mistakes, so that all of them are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from trainers.data.captions import FolderCaptions
from trainers.data.folders import FolderContents
from trainers.data.intake import Intake
from trainers.errors import UserError

Read = Callable[[FolderContents], FolderCaptions]
ReadFiles = Callable[[Sequence[Path]], FolderCaptions]


def read_valid_captions(contents: FolderContents, read: Read, intake: Intake) -> FolderCaptions:
    """What `read` gives, or gives without the files that have mistakes where these do not end the
    reading (`intake.keeps_going`). Raises: UserError, as `read`."""
    if not intake.keeps_going:
        return read(contents)

    def read_metadata(files: Sequence[Path]) -> FolderCaptions:
        return read(replace(contents, metadata=list(files), sidecars=[]))

    metadata = find_valid(contents.metadata, read_metadata, intake)

    def read_sidecars(files: Sequence[Path]) -> FolderCaptions:
        return read(replace(contents, metadata=metadata, sidecars=list(files)))

    try:
        read_sidecars([])
    except UserError as error:
        # no file's own mistake: such as a column, without metadata that could have it
        intake.fail(error)
        return FolderCaptions()
    return read_sidecars(find_valid(contents.sidecars, read_sidecars, intake))


def find_valid(files: Sequence[Path], read: ReadFiles, intake: Intake) -> list[Path]:
    """The files that can be read together; the others are halved until each stands alone."""
    if not files or is_valid(files, read):
        return list(files)
    if len(files) == 1:
        intake.attempt(partial(read, files), None, [str(files[0])])
        return []
    middle = len(files) // 2
    first = find_valid(files[:middle], read, intake)
    second = find_valid(files[middle:], read, intake)
    if is_valid([*first, *second], read):
        return [*first, *second]
    # one contradicts another
    valid = first
    for path in second:
        try:
            read([*valid, path])
        except UserError as error:
            intake.fail(error, [str(path)])
        else:
            valid = [*valid, path]
    return valid


def is_valid(files: Sequence[Path], read: ReadFiles) -> bool:
    try:
        read(files)
    except UserError:
        return False
    return True
