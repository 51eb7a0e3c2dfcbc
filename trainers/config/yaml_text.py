"""YAML text as plain values, by YAML 1.2's rules and within limits, and plain values as YAML text.

A file may come from anywhere, so nothing in it may take long, take much memory or run code.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MAX_BYTES = 2**18
MAX_DEPTH = 20
MAX_NODES = 20_000  # with what aliases stand for

TEXT_TAG = "tag:yaml.org,2002:str"
RARE_LINE_BREAKS = "\r\x85\u2028\u2029"
MERGE_TAG = "tag:yaml.org,2002:merge"

# What plain words mean in YAML 1.2. In 1.1, `no` is false, 010 is 8, 1:30 is 90 and 1e-4 is text.
CORE_SCHEMA = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}

HINTS = {
    "'\\t'": "indent with spaces instead of tabs",
    "mapping values are not allowed": "put a text that has ': ' in quotes",
    "incompatible YAML": "remove the line %YAML",
}


class ConfigLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does, and takes a repeated key for a mistake."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  each class of PyYAML has its own

    def __init__(self, stream: str | bytes) -> None:
        super().__init__(stream)
        self.depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            count_nodes(node, {})
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if self.depth >= MAX_DEPTH:
            message = f"more than {MAX_DEPTH} brackets or levels lie within each other"
            raise ConstructorError(None, None, message, event.start_mark)
        is_node = isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent))
        if is_node and event.tag not in (None, TEXT_TAG):
            message = f"tags such as {event.tag!r} are not allowed: remove it"
            raise ConstructorError(None, None, message, event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_scalar(self, node: yaml.Node) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            message = "a text may have neither NUL nor half of a surrogate pair"
            raise ConstructorError(None, None, message, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                message = "a key must be a word, not a list or a section"
                raise ConstructorError(None, None, message, key.start_mark)
            if key.value in seen:
                message = f"the key {key.value!r} occurs twice"
                raise ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
            if key.tag != MERGE_TAG:
                key.tag = TEXT_TAG
        return super().construct_mapping(node, deep)


class ConfigDumper(yaml.SafeDumper):
    """Quotes the strings that YAML 1.1 or `ConfigLoader` would take for something else."""


def represent_text(dumper: ConfigDumper, text: str) -> yaml.Node:
    """In double quotes where PyYAML would read another line break back than it wrote."""
    has_rare_breaks = any(letter in text for letter in RARE_LINE_BREAKS)
    return dumper.represent_scalar(TEXT_TAG, text, style='"' if has_rare_breaks else None)


ConfigDumper.add_representer(str, represent_text)

for name, (pattern, first_letters) in CORE_SCHEMA.items():
    resolver = (f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list(first_letters))
    ConfigLoader.add_implicit_resolver(*resolver)
    ConfigDumper.add_implicit_resolver(*resolver)


def count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values a node stands for, its aliases written out.

    counts: those of nodes by id, 0 for one that is being counted. Raises: ConstructorError when
    there are too many, or when a node lies in itself.
    """
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise ConstructorError(None, None, "an alias stands within itself", node.start_mark)
        return counts[id(node)]
    counts[id(node)] = 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    total = 1
    for child in children:
        total += count_nodes(child, counts)
        if total > MAX_NODES:
            message = f"with its aliases written out it has more than {MAX_NODES} values"
            raise ConstructorError(None, None, message, node.start_mark)
    counts[id(node)] = total
    return total


def parse_yaml(text: str | bytes) -> Any:
    """The values in YAML text. Raises: yaml.YAMLError with one line that says where and what."""
    size = len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise yaml.YAMLError(f"it has {size} bytes, more than {MAX_BYTES}")
    try:
        return yaml.load(text, ConfigLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError is PyYAML's own, for a number of more digits than Python reads
        raise yaml.YAMLError(describe_yaml_error(error)) from None


def describe_yaml_error(error: Exception) -> str:
    message, where = " ".join(str(error).split()), ""
    if isinstance(error, yaml.MarkedYAMLError):
        message = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    hints = [hint for words, hint in HINTS.items() if words in message]
    return where + ": ".join([message, *hints])
