"""Options on a command line that should be overrides, and config files that do not exist."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from trainers.config import KINDS
from trainers.config.peer_keys import LAUNCHER_FLAGS, PATHS_BY_NAME

MAX_NAMES = 3  # that a message proposes


def option_errors(unknown: Sequence[str], words: Sequence[str]) -> Iterator[str]:
    """A sentence for each option that the script does not have, with the form that it takes.

    unknown: what the parser has left over; words: the whole command line.
    """
    for option in unknown:
        if not option.startswith("-"):
            continue
        name, equals, value = option.partition("=")
        if not equals:
            following = [*words[words.index(option) + 1 :], "-"][0]
            is_value = not following.startswith("-") and "=" not in following
            value = following if is_value and not following.endswith(".yaml") else "true"
        yield f"{option}: there is no such option; {override_hint(name.lstrip('-'), value)}"


def override_hint(name: str, value: str) -> str:
    """What to write instead of `--name value`."""
    paths = paths_named(name)
    if name in LAUNCHER_FLAGS:
        return f"accelerate launch says it, before the script's name: {LAUNCHER_FLAGS[name]}"
    if paths:
        return f"write {' or '.join(f'{path}={value}' for path in paths[:MAX_NAMES])}"
    return "settings are written without dashes, as section.key=value"


def paths_named(name: str) -> list[str]:
    """The keys that are meant by section.key, by key alone, or by another trainer's name for it."""
    name = name.replace("-", "_")
    known = list(dict.fromkeys(all_paths()))
    if name in known:
        return [name]
    if exact := [path for path in known if path.rpartition(".")[2] == name]:
        return exact
    if PATHS_BY_NAME.get(name) in known:
        return [PATHS_BY_NAME[name]]
    names = known if "." in name else [path.rpartition(".")[2] for path in known]
    close = get_close_matches(name, names, 1, 0.7)
    return paths_named(close[0]) if close else []


def all_paths() -> Iterator[str]:
    """Every key of every kind, as section.key."""
    for model in KINDS.values():
        for name, value in model().model_dump().items():
            if isinstance(value, dict):
                yield from (f"{name}.{key}" for key in value)
            else:
                yield name


def missing_config_hint(path: Path) -> str:
    """'; did you mean ...?' with config files whose names are near; empty where there are none."""
    # unlike `Path.is_dir`, it takes what no file system takes
    is_folder = os.path.isdir(path)
    folders = [path] if is_folder else [path.parent, Path("configs")]
    files = []
    for folder in filter(os.path.isdir, folders):
        files += sorted(folder.glob("*.yaml"))
    names = {file.stem: str(file) for file in reversed(files)}
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    if is_folder:
        found = list(names)[::-1]
    elif stem in names:
        found = [stem]
    else:
        found = get_close_matches(stem, names, MAX_NAMES, 0.6)
        found = found or [name for name in names if stem and stem in name]
    found = [names[name] for name in found[:MAX_NAMES]]
    return f"; did you mean {' or '.join(found)}?" if found else ""
