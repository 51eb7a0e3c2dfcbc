"""The reference of a kind of config, from its typed classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainers.config import Config

Schema = Mapping[str, Any]

COLUMNS = ("key", "type", "default", "limits", "meaning")
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
}
LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "maxProperties": "at most {} names",
}
INTRODUCTION = """# {title}: every key

{description}

A key is set in the YAML file, in its section, or on the command line as `section.key=value`. What a
config does not set has the default. `null` in the column "type" means that the key may be empty. In
paths, `~` at the beginning is your home folder.
"""


def page(kind: str, model: type[Config]) -> str:
    """The page of one kind of config."""
    schema = model.model_json_schema()
    keys, sections = [], []
    for name, part in schema["properties"].items():
        target = section_schema(part, schema)
        if target is None:
            keys.append(row(name, part))
        else:
            sections.append(section_text(name, part, target))
            sections += listed_sections(name, target, schema)
    head = INTRODUCTION.format(title=f"`kind: {kind}`", description=schema["description"])
    return "\n".join([head, table(keys), *sections])


def section_schema(part: Schema, schema: Schema) -> Schema | None:
    """What a property refers to, which may be one of several; None where it is no section."""
    for option in (part, *part.get("anyOf", ()), *part.get("oneOf", ())):
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rpartition("/")[2]]
    return None


def listed_sections(name: str, section: Schema, schema: Schema) -> list[str]:
    """The keys of the sections, and of the lists of sections, that a section has."""
    texts = []
    for key, part in section["properties"].items():
        nested = section_schema(part, schema)
        if nested:
            texts.append(section_text(f"{name}.{key}", {}, nested))
        for option in (part, *part.get("anyOf", ())):
            target = section_schema(option.get("items", {}), schema)
            if target:
                texts.append(section_text(f"{name}.{key}", {}, target))
    return texts


def section_text(name: str, part: Schema, target: Schema) -> str:
    may_be_null = f" {part['description']}" if "anyOf" in part else ""
    rows = [row(f"{name}.{key}", value) for key, value in target["properties"].items()]
    return f"\n## {name}\n\n{target['description']}{may_be_null}\n\n{table(rows)}"


def row(path: str, part: Schema) -> list[str]:
    default = json.dumps(part.get("default"), ensure_ascii=False)
    cells = [f"`{path}`", type_text(part), f"`{default}`", limits_text(part)]
    return [*cells, part.get("description", "")]


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for cells in rows:
        escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        lines.append("| " + " | ".join(escaped) + " |")
    return "\n".join(lines) + "\n"


def type_text(part: Schema) -> str:
    """The type in words; of several, one after the other."""
    if "$ref" in part:
        return "sections"
    if options := part.get("anyOf") or part.get("oneOf"):
        return ", ".join(dict.fromkeys(type_text(option) for option in options))
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    if part.get("format") == "path":
        return "path"
    if part["type"] == "null":
        return "null"
    if part["type"] == "object":
        return f"names, each with: {type_text(part['additionalProperties'])}"
    if part["type"] == "array":
        items = part.get("items") or part["prefixItems"][0]
        count = "" if "items" in part else f"{len(part['prefixItems'])} of "
        return f"list of {count}{type_text(items)}"
    return TYPES[part["type"]]


def limits_text(part: Schema) -> str:
    options = [part, *part.get("anyOf", ()), *part.get("prefixItems", ())[:1]]
    found = []
    for option in options:
        for name, text in LIMITS.items():
            if name in option and not ("prefixItems" in option and name.endswith("Items")):
                found.append(text.format(f"{option[name]:,}"))
    return ", ".join(dict.fromkeys(found))
