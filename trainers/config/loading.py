"""A YAML file and `section.key=value` overrides become one frozen, typed `Config`.

Every mistake in them is reported at once. `python -m trainers.config.loading` prints the JSON
schema that editors use to complete keys.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from trainers.config import KINDS, Config, DreamBoothConfig
from trainers.config.base_rules import reduce_warmup
from trainers.config.base_sections import NESTED_SECTIONS, Section
from trainers.config.command_line import missing_config_hint, override_hint
from trainers.config.peer_keys import LAUNCHER_FLAGS, PATHS_BY_NAME
from trainers.config.photo_rules import is_picture_folder
from trainers.config.photo_sections import ConceptConfig, concept_name
from trainers.config.sample_prompts import ITEM_TAGS, SamplePrompt
from trainers.config.yaml_text import MAX_BYTES, MAX_DEPTH, ConfigDumper, parse_yaml
from trainers.errors import UserError

LISTED_SECTIONS: dict[str, type[Section]] = {
    "data.concepts": ConceptConfig,
    "validation.prompts": SamplePrompt,
}
# for pairs of numbers, of which pydantic speaks as Python does
OTHER_WORDS = {"tuple_type": "must be a list", "missing": "must have more items"}
MAX_SHOWN = 120  # characters of a value in a message
LISTED_SECTION = re.compile(r"(\w+)\[(.+)\]")  # data.concepts[rex].repeats, as messages write it


def load_config(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    needs_pictures: bool = True,
) -> Config:
    """The config in the YAML file `path`, changed by `section.key=value` overrides.

    needs_pictures: whether it is a mistake that the folders with the pictures are not there.
    Raises: UserError that lists every mistake, a line each, with its path and, for a wrong name,
    the most similar right one.
    """
    tree = read_tree(Path(path))
    messages = [apply_override(tree, override) for override in overrides]
    config, errors = validate(tree, needs_pictures)
    mistakes = [message for message in (*messages, *errors) if message]
    if mistakes:
        raise UserError("\n".join(mistakes))
    config, notes = reduce_warmup(config)
    for note in (*notes, *config.notes()):
        warnings.warn(note, stacklevel=2)
    return config


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of a config file. Raises: UserError."""
    try:
        with open(path, "rb") as file:
            # one byte more than is allowed, so that `parse_yaml` refuses it
            tree = parse_yaml(file.read(MAX_BYTES + 1))
    except OSError as error:
        hint = missing_config_hint(path)
        raise UserError(f"the config {path} cannot be read: {error.strerror}{hint}") from None
    except ValueError:
        raise UserError(f"the config {str(path)!r} is not the path of a file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        raise UserError(f"{path} is empty: copy one of configs/*.yaml and change it")
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise UserError(
            f"{path} must contain sections such as 'model:' and 'data:', but it is a {kind}"
        )
    return tree


def apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one `section.key=value` in `tree`; returns what is wrong with it, if anything."""
    name, equals, value = override.partition("=")
    shown = shorten(override)
    *sections, key = name.split(".")
    if equals and name.startswith("--"):
        hint = override_hint(name.lstrip("-"), value)
        return f"{shown}: an override has no dashes; {hint}"
    if not equals or not key or len(sections) >= MAX_DEPTH:
        return f"{shown}: an override must have the form section.key=value"
    for section in sections:
        if match := LISTED_SECTION.fullmatch(section):
            tree, names = enter_list(tree, *match.groups())
            if tree is None:
                known = f"it has {', '.join(names)}" if names else "there are none"
                return f"{shown}: {match[1]} has none named {match[2]}, {known}"
            continue
        inner = {} if tree.get(section) is None else tree[section]
        if isinstance(inner, list):
            return f"{shown}: {section} is a list: name one of it, as {section}[NAME].{key}"
        if not isinstance(inner, dict):
            return f"{shown}: {section} is not a section"
        # a copy, because a YAML alias may have put the same section elsewhere too
        tree[section] = dict(inner)
        tree = tree[section]
    try:
        tree[key] = parse_yaml(value)
    except yaml.YAMLError as error:
        return f"{shown}: not a YAML value ({error}); quote it if it is text"
    return None


def enter_list(
    tree: dict[str, Any], key: str, name: str
) -> tuple[dict[str, Any] | None, list[str]]:
    """A section of a list by its name, if it is there, and the names of all; it is a copy that the
    list has from now on, see `apply_override`."""
    listed = tree.get(key)
    parts = listed if isinstance(listed, list) else []
    sections = [dict(part) if isinstance(part, dict) else {} for part in parts]
    names = [concept_name(section.get("name"), i) for i, section in enumerate(sections)]
    if name not in names:
        return None, names
    place = names.index(name)
    tree[key] = [*parts[:place], sections[place], *parts[place + 1 :]]
    return sections[place], names


def validate(tree: dict[str, Any], needs_pictures: bool = True) -> tuple[Config, list[str]]:
    """The config and its mistakes, those against the rules between keys too."""
    config, messages = parse_tree(tree)
    for path, message in config.errors():
        # without the list of concepts, what is missing in the section says nothing
        if "data.concepts" in messages and path.startswith("data."):
            continue
        if needs_pictures or not is_picture_folder(path):
            messages.setdefault(path, f"{path}: {message}")
    return config, list(messages.values())


def parse_tree(tree: dict[str, Any]) -> tuple[Config, dict[str, str]]:
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
                location = locate(problem["loc"])
                shown = show_location(location, tree)
                messages.setdefault(".".join(shown), describe_error(problem, shown, model))
                remove_path(tree, location)
        except Exception as error:  # a value that pydantic itself cannot take
            location = find_unusable(tree, model)
            message = f"cannot be used ({type(error).__name__}: {shorten(str(error))})"
            messages.setdefault(".".join(location), f"{'.'.join(location)}: {message}")
            remove_path(tree, location)
    return config, messages


def locate(where: Sequence[str | int]) -> list[str | int]:
    """A section and its key, in a list of sections also which, and its key there; what follows is
    within the value."""
    where = where[:3] + tuple(part for part in where[3:] if part not in ITEM_TAGS)
    is_list = len(where) > 3 and isinstance(where[2], int) and isinstance(where[3], str)
    is_nested = len(where) > 2 and f"{where[0]}.{where[1]}" in NESTED_SECTIONS
    return list(where[: 4 if is_list else 3 if is_nested else 2])


def show_location(location: Sequence[str | int], tree: Mapping[str, Any]) -> list[str]:
    """With the name of a section of a list, as in data.concepts[rex].repeats."""
    if len(location) < 4:
        return [str(part) for part in location]
    section, key, i, inner_key = location
    item = tree[section][key][i]
    name = item.get("prompt", i + 1) if key == "prompts" else concept_name(item.get("name"), i)
    return [section, f"{key}[{shorten(str(name))}]", inner_key]


def find_unusable(tree: dict[str, Any], model: type[Config]) -> list[str]:
    """Section and key of the first value with which the model fails other than by a refusal."""
    for name, value in tree.items():
        parts = [[name, key] for key in value] if isinstance(value, dict) else [[name]]
        for location in parts:
            inner = value if len(location) == 1 else {location[1]: value[location[1]]}
            try:
                model.model_validate({name: inner})
            except ValidationError:
                continue
            except Exception:
                return location
    # only several values together fail; the sections go one by one, so that this ends
    return [next(iter(tree))]


def describe_error(problem: Any, location: list[str], model: type[Config]) -> str:
    path, value = ".".join(location), problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{shorten(path)}: unknown key{suggest_path(location, model)}"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{path}: {invalid_choice(value, choices)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = OTHER_WORDS.get(problem["type"], message[0].lower() + message[1:])
    hint = ""
    if problem["type"] == "string_type" and isinstance(value, (bool, int, float)):
        hint = "; if it is text, put it in quotes"
    return f"{path}: {message}, not {shorten(repr(value))}{hint}"


def shorten(text: str) -> str:
    """In one line, the middle of a long one left out."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-20:]}"


def invalid_choice(value: Any, choices: Iterable[str]) -> str:
    shown = shorten(repr(value))
    close = get_close_matches(str(value)[:MAX_SHOWN], choices, 1, 0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{shown} is not one of {', '.join(choices)}{hint}"


def suggest_path(location: list[str], model: type[Config]) -> str:
    """The hint '; did you mean ...?' with the most similar path; empty where none is similar.

    What other trainers call a key comes first, then one of the same section.
    """
    *section, key = [part.partition("[")[0] for part in location]
    key, paths = key[:MAX_SHOWN], known_paths(model)
    siblings = [path for path in paths if path.split(".")[:-1] == section]
    if key in LAUNCHER_FLAGS:
        return f"; accelerate launch says it: {LAUNCHER_FLAGS[key]}"
    if PATHS_BY_NAME.get(key) in paths:
        return f"; did you mean {PATHS_BY_NAME[key]}?"
    for pool, cutoff in ((siblings, 0.6), (paths, 0.7)):
        # reversed, so that of two equal names the first path counts
        names = {path.rpartition(".")[2]: path for path in reversed(pool)}
        if close := get_close_matches(key, names, 1, cutoff):
            return f"; did you mean {names[close[0]]}?"
    return ""


def known_paths(model: type[Config]) -> list[str]:
    """Every section, and every key as section.key; those of a list's sections have no number."""
    paths = []
    for name, value in model().model_dump().items():
        paths.append(name)
        if isinstance(value, dict):
            paths += [f"{name}.{key}" for key in value]
    for path, section in NESTED_SECTIONS.items():
        paths += [f"{path}.{key}" for key in section.model_fields]
    for path, section in LISTED_SECTIONS.items():
        paths += [f"{path}.{key}" for key in section.model_fields if path in paths]
    return paths


def remove_path(tree: Any, location: Sequence[str | int]) -> None:
    """Remove the part of `tree` at `location`, or the nearest enclosing part that exists."""
    for part in location[:-1]:
        inner = tree[part] if isinstance(tree, list) else tree.get(part)
        if not isinstance(inner, (dict, list)):
            tree.pop(part, None)
            return
        tree = inner
    tree.pop(location[-1], None)


def dump_config(config: Config, leave_out: Sequence[str] = ()) -> str:
    """YAML text that loads again to an equal config, apart from sections that are left out."""
    tree = config.model_dump(mode="json", exclude=set(leave_out))
    return yaml.dump(tree, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """One schema for every kind of trainer; editors choose by `kind`."""
    any_kind = reduce(or_, KINDS.values())
    return json.dumps(TypeAdapter(any_kind).json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
