"""A YAML file and `section.key=value` overrides become one frozen, typed `Config`.

Every mistake in them is reported at once. `python -m trainers.config.loading` prints the JSON
schema that editors use to complete keys.
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


class ConfigLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does, and takes a repeated key for a mistake."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                message = f"the key {key.value!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(str(key.value))
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


FLOAT_PATTERN = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$")
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_PATTERN, list("-+.0123456789"))


class ConfigDumper(yaml.SafeDumper):
    """Quotes the strings that `ConfigLoader` would take for numbers, such as '1e5'."""


# which strings need quotes follows from what the loader takes for a number
ConfigDumper.yaml_implicit_resolvers = ConfigLoader.yaml_implicit_resolvers


def parse_yaml(text: str | bytes) -> Any:
    """The values in YAML text. Raises: yaml.YAMLError."""
    try:
        return yaml.load(text, ConfigLoader)
    except ValueError as error:
        # PyYAML's own, for what looks like a date and is none
        raise yaml.YAMLError(error) from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config in the YAML file `path`, changed by `section.key=value` overrides.

    Raises: UserError that lists every mistake, a line each, with its path and, for a wrong name,
    the most similar right one.
    """
    tree = read_tree(path)
    messages = [apply_override(tree, override) for override in overrides]
    config, errors = validate(tree)
    mistakes = [message for message in (*messages, *errors) if message]
    if mistakes:
        raise UserError("\n".join(mistakes))
    return config


def read_tree(path: str | Path) -> dict:
    """The sections in a YAML file, not validated. Raises: UserError."""
    try:
        tree = parse_yaml(Path(path).read_bytes()) or {}
    except OSError as error:
        raise UserError(f"the config {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise UserError(
            f"{path} must contain sections such as 'model:' and 'data:', but it is a {kind}"
        )
    return tree


def apply_override(tree: dict, override: str) -> str | None:
    """Set one `section.key=value` in `tree`; returns what is wrong with it, if anything."""
    name, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an override must have the form section.key=value"
    *sections, key = name.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return f"{override}: {section} is not a section"
    try:
        tree[key] = parse_yaml(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", error)
        return f"{override}: not a YAML value ({problem}); quote it if it is text"
    return None


def validate(tree: dict) -> tuple[Config, list[str]]:
    """The config and its mistakes, those against the rules between keys too."""
    config, messages = parse_tree(tree)
    for path, message in config.errors():
        messages.setdefault(path, f"{path}: {message}")
    return config, list(messages.values())


def parse_tree(tree: dict) -> tuple[Config, dict[str, str]]:
    """The config, and the mistakes in names and values by their paths.

    A wrong value is reported and removed, so that the rest can still be checked.
    """
    messages: dict[str, str] = {}
    kind = str(tree.get("kind", "dreambooth"))
    if kind not in KINDS:
        messages["kind"] = f"kind: {invalid_choice(kind, KINDS)}"
        tree.pop("kind")
    model = KINDS.get(kind, DreamBoothConfig)
    while True:
        try:
            config = model.model_validate(tree)
            break
        except ValidationError as error:
            for problem in error.errors():
                # a section and its key; what follows is within the value
                location = [str(part) for part in problem["loc"][:2]]
                messages.setdefault(".".join(location), describe_error(problem, location, model))
                remove_path(tree, location)
    return config, messages


def describe_error(problem: Any, location: list[str], model: type[Config]) -> str:
    path, value = ".".join(location), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key{suggest_path(location, model)}"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{path}: {invalid_choice(value, choices)}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{path}: {message}, not {value!r}"


def invalid_choice(value: Any, choices: Iterable[str]) -> str:
    close = get_close_matches(str(value), choices, 1, 0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{value!r} is not one of {', '.join(choices)}{hint}"


def suggest_path(location: list[str], model: type[Config]) -> str:
    """The hint '; did you mean ...?' with the most similar path; empty where none is similar.

    A key of the same section comes before one of another section.
    """
    *section, key = location
    paths = known_paths(model)
    siblings = [path for path in paths if path.split(".")[:-1] == section]
    for pool, cutoff in ((siblings, 0.6), (paths, 0.7)):
        # reversed, so that of two equal names the first path counts
        names = {path.rpartition(".")[2]: path for path in reversed(pool)}
        if close := get_close_matches(key, names, 1, cutoff):
            return f"; did you mean {names[close[0]]}?"
    return ""


def known_paths(model: type[Config]) -> list[str]:
    """Every section, and every key as section.key."""
    paths = []
    for name, value in model().model_dump().items():
        paths.append(name)
        if isinstance(value, dict):
            paths += [f"{name}.{key}" for key in value]
    return paths


def remove_path(tree: Any, location: list[str]) -> None:
    """Remove the part of `tree` at `location`, or the nearest enclosing part that exists."""
    for part in location[:-1]:
        if not isinstance(tree.get(part), dict):
            tree.pop(part, None)
            return
        tree = tree[part]
    tree.pop(location[-1], None)


def dump_config(config: Config) -> str:
    """YAML text that loads again to an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=ConfigDumper, sort_keys=False, allow_unicode=True
    )


def json_schema() -> str:
    """One schema for every kind of trainer; editors choose by `kind`."""
    any_kind = reduce(or_, KINDS.values())
    return json.dumps(TypeAdapter(any_kind).json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
