"""Every check of README, docs and configs, each mistake with its place."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml
from pydantic import ValidationError

from documentation import code_blocks
from documentation.code_blocks import Piece
from documentation.commands import PLACEHOLDER, command_mistakes
from trainers.config import KINDS
from trainers.config.loading import known_paths, validate
from trainers.config.yaml_text import parse_yaml


def all_mistakes() -> Iterator[str]:
    for path in code_blocks.markdown_files():
        yield from markdown_mistakes(path)
    for path in code_blocks.config_files():
        yield from config_file_mistakes(path)


def config_file_mistakes(path: Path) -> Iterator[str]:
    yield from told(code_blocks.config_commands(path))
    yield from override_mistakes(code_blocks.config_comments(path))


def markdown_mistakes(path: Path) -> Iterator[str]:
    yield from told(code_blocks.commands(path))
    yield from override_mistakes(code_blocks.prose(path))
    for block in code_blocks.blocks(path, "python"):
        yield from snippet_mistakes(block)
    for block in code_blocks.blocks(path, "yaml"):
        yield from yaml_mistakes(block)
    for link in code_blocks.links(path):
        if not (path.parent / link.text).exists():
            yield f"{link.place}: {link.text} is not there"


def told(pieces: Iterator[Piece]) -> Iterator[str]:
    for piece in pieces:
        for mistake in command_mistakes(piece.text):
            yield f"{piece.place}: `{piece.text}`: {mistake}"


def override_mistakes(pieces: Iterator[Piece]) -> Iterator[str]:
    """Keys that no kind of config has, and values that none takes."""
    for piece, path, value in code_blocks.overrides(pieces):
        if path.partition(".")[0] not in sections():
            continue
        kinds = [model for model in KINDS.values() if path in known_paths(model)]
        if not kinds:
            yield f"{piece.place}: no config has the key {path}"
        elif not PLACEHOLDER.search(value) and not any(takes(kind, path, value) for kind in kinds):
            yield f"{piece.place}: {path} does not take {value}"


@cache
def sections() -> set[str]:
    return {path.partition(".")[0] for model in KINDS.values() for path in known_paths(model)}


def takes(model, path: str, text: str) -> bool:
    try:
        tree = parse_yaml(text)
        for key in reversed(path.split(".")):
            tree = {key: tree}
        model.model_validate(tree)
    except (ValidationError, yaml.YAMLError):
        return False
    return True


def snippet_mistakes(block: Piece) -> Iterator[str]:
    """A snippet that does not compile, or imports what the package does not have."""
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        yield f"{block.place}: it does not compile: {error}"
        return
    for node in ast.walk(tree):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.startswith("trainers"):
            spec = importlib.util.find_spec(module)
            names = defined_names(Path(spec.origin)) if spec and spec.origin else set()
            for alias in node.names:
                if alias.name not in names:
                    yield f"{block.place}: {module} has no {alias.name}"


def defined_names(path: Path) -> set[str]:
    """The names at the top of a module, by its text."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {part.id for part in node.targets if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
    return names


def yaml_mistakes(block: Piece) -> Iterator[str]:
    """A block of YAML that is a part of a config for none of the kinds."""
    tree = parse_yaml(block.text)
    if not isinstance(tree, dict):
        yield f"{block.place}: it has no sections"
        return
    kinds = [tree["kind"]] if "kind" in tree else list(KINDS)
    # a mistake of names or values; what is missing stands elsewhere in the reader's file
    found = [wrong_names(json.loads(json.dumps(tree)), kind) for kind in kinds]
    if all(found):
        yield from (f"{block.place}: {message}" for message in found[0])


def wrong_names(tree: dict, kind: str) -> list[str]:
    given = {f"{section}.{key}" for section, part in tree.items() for key in keys_of(part)}
    _, messages = validate(tree | {"kind": kind}, needs_pictures=False)
    return [message for message in messages if message.partition(":")[0] in {*given, *tree}]


def keys_of(part: object) -> list[str]:
    return list(part) if isinstance(part, dict) else []
