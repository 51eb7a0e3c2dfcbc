"""Find out whose config a file is, and read it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainers.config.importers import ai_toolkit, diffusers_scripts, kohya, onetrainer, simpletuner
from trainers.config.importers.base import ForeignConfig
from trainers.config.yaml_text import parse_yaml
from trainers.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 2**20
TOOLS = "kohya's TOML, ai-toolkit's YAML, SimpleTuner's or OneTrainer's JSON, a diffusers command"


def import_config(path: Path) -> ForeignConfig:
    """Another trainer's config, with our settings found in it. Raises: UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than 1 MiB, which no config is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text") from None
    if diffusers_scripts.is_command(text):
        return diffusers_scripts.read(text)
    tree = simpletuner.with_lycoris(parse(path, text), path.parent)
    for module in (ai_toolkit, onetrainer, simpletuner, kohya):
        if module.is_config(tree):
            return module.read(tree)
    raise UserError(f"{path} is none of the configs that can be imported: {TOOLS}")


def parse(path: Path, text: str) -> Mapping[str, Any]:
    """The values of a TOML, JSON or YAML file. Raises: UserError."""
    parsers = {".toml": tomllib.loads, ".json": json.loads}
    try:
        tree = parsers.get(path.suffix.lower(), parse_yaml)(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} cannot be parsed: {error}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} has no keys. What can be imported: {TOOLS}")
    return tree
