"""Whether a value keeps to a JSON schema, as far as the configs' schema says something."""

from __future__ import annotations

import re
from typing import Any

from trainers.config.bounds import MAX_PATH_LENGTH

PYTHON_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def outside(value: Any, schema: dict, definitions: dict) -> bool:
    """Whether a value lies outside of every alternative that the schema has for it."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return all(outside(value, part, definitions) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value not in schema.get("enum", [schema.get("const")])
    kind = schema["type"]
    if not isinstance(value, PYTHON_TYPES[kind]) or isinstance(value, bool) != (kind == "boolean"):
        return True
    if kind == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        is_long = len(value) > schema.get("maxProperties", len(known))
        parts = [(value[key], known.get(key, others)) for key in value]
        return is_long or any(outside(part, inner, definitions) for part, inner in parts)
    if kind == "array":
        inner = schema.get("prefixItems") or [schema["items"]] * len(value)
        is_long = len(value) > schema["maxItems"]
        return is_long or any(map(outside, value, inner, [definitions] * len(value)))
    if kind == "string":
        is_long = len(value) > schema.get("maxLength", MAX_PATH_LENGTH)
        return is_long or not re.search(schema.get("pattern", ""), value)
    if kind in ("null", "boolean"):
        return False
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    return not low <= value <= high
