"""Text of users as Markdown: it shows as it was written, and never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Mapping

# An underscore between letters or digits is plain text in every Markdown dialect.
MARKUP = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")


def escape_markdown(text: object) -> str:
    """The text in one line, with a backslash before each character that Markdown or HTML reads."""
    return MARKUP.sub(r"\\\g<0>", " ".join(str(text).split()))


def unescape_markdown(text: str) -> str:
    """The inverse of `escape_markdown`."""
    return ESCAPED.sub(r"\1", text)


def plain_text(text: str) -> str:
    """Markdown of ours without its code spans and emphasis, for a terminal."""
    return re.sub("[`*]", "", text)


def code_span(text: str) -> str:
    """The text in one line as code, between more backticks than it has in a row itself."""
    text = " ".join(text.split())
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest_run + 1)
    # Markdown removes one space on both sides, which keeps the text's own backticks apart.
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def markdown_table(rows: Mapping[str, object]) -> str:
    """A table of two columns without headings."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        lines.append(f"| {escape_markdown(name)} | {escape_markdown(value)} |")
    return "\n".join(lines)
