"""A YAML file and `section.key=value` overrides become one frozen, typed `Config`; every mistake is told at once.

`python -m trainers.config.loading` prints the JSON schema that editors use to complete keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from trainers.config import KINDS, Config, DreamBoothConfig
from trainers.errors import UserError


class Loader(yaml.SafeLoader):
    """YAML 1.2's floats, so that 1e-4 is a number; a key that is given twice is a mistake."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


NUMBER = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$")


Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


class Dumper(yaml.SafeDumper):
    """Quotes the strings that `Loader` would take for numbers, such as '1e5'."""


Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def parse(text: str | bytes) -> Any:
    """Raises: yaml.YAMLError."""
    try:
        return yaml.load(text, Loader)
    except ValueError as error:  # of what looks like a date
        raise yaml.YAMLError(error) from None


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config in the YAML file `path`, changed by `section.key=value` overrides.

    Raises: UserError that lists every mistake, a line each, with its path and the nearest right name.
    """
    try:
        tree = parse(Path(path).read_bytes()) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as 'model:' and 'data:', not a {type(tree).__name__}")
    found = [message for override in overrides if (message := apply(tree, override))]
    config, more = validate(tree)
    if found + more:
        raise UserError("\n".join(found + more))
    return config


def apply(tree: dict, override: str) -> str | None:
    """Set one `section.key=value` in `tree`; returns what is wrong with it, if anything."""
    name, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an override is written section.key=value"
    *sections, key = name.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return f"{override}: {section} is not a section"
    try:
        tree[key] = parse(value)
    except yaml.YAMLError as error:
        return f"{override}: not a YAML value ({getattr(error, 'problem', error)}); quote it if it is a text"
    return None


def validate(tree: dict) -> tuple[Config, list[str]]:
    """The config and its mistakes. A wrong value is dropped and told, so that the rest can still be checked."""
    messages: dict[str, str] = {}
    kind = str(tree.get("kind", "dreambooth"))
    if kind not in KINDS:
        messages["kind"] = f"kind: {one_of(kind, KINDS)}"
        tree.pop("kind")
    model = KINDS.get(kind, DreamBoothConfig)
    while True:
        try:
            config = model.model_validate(tree)
            break
        except ValidationError as error:
            for problem in error.errors():
                location = [str(part) for part in problem["loc"][:2]]  # a section and its key
                messages.setdefault(".".join(location), describe(problem, location, model))
                remove(tree, location)
    for path, message in config.mistakes():
        messages.setdefault(path, f"{path}: {message}")
    return config, list(messages.values())


def describe(problem: Any, location: list[str], model: type[Config]) -> str:
    path, seen = ".".join(location), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key{nearest(location, model)}"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{path}: {one_of(seen, choices)}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{path}: {message}, not {seen!r}"


def one_of(seen: Any, choices: Iterable[str]) -> str:
    close = get_close_matches(str(seen), choices, 1, 0.5)
    return f"{seen!r} is not one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")


def nearest(location: list[str], model: type[Config]) -> str:
    """'; did you mean ...?' with the config's most similar path, looking in the same section first."""
    *section, key = location
    paths = known_paths(model)
    siblings = [p for p in paths if p.split(".")[:-1] == section]
    for pool, least in ((siblings, 0.6), (paths, 0.7)):
        names = {p.rpartition(".")[2]: p for p in reversed(pool)}
        if close := get_close_matches(key, names, 1, least):
            return f"; did you mean {names[close[0]]}?"
    return ""


def known_paths(model: type[Config]) -> list[str]:
    paths = []
    for name, value in model().model_dump().items():
        paths += [name, *(f"{name}.{key}" for key in value)] if isinstance(value, dict) else [name]
    return paths


def remove(tree: Any, location: list[str]) -> None:
    """Drop the part of `tree` at `location`, or the nearest enclosing part that exists."""
    for part in location[:-1]:
        if not isinstance(tree.get(part), dict):
            tree.pop(part, None)
            return
        tree = tree[part]
    tree.pop(location[-1], None)


def dump(config: Config) -> str:
    """YAML text that loads again to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def schema() -> str:
    """One schema for every kind of trainer; editors choose by `kind`."""
    return json.dumps(TypeAdapter(reduce(or_, KINDS.values())).json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
