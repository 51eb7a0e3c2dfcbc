"""The commands, overrides, snippets and links that README, docs and configs have in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# what a command in the text begins with
PROGRAMS = ("accelerate ", "python ", "make ", "pytest ", "sbatch ", "bash ")
COMMAND = re.compile(rf"({'|'.join(PROGRAMS)})")
OVERRIDE = re.compile(r"(?<![\w.-])([a-z]\w*(?:\.[a-z]\w*)+)=(\[[^\]]*\]|[^\s`,;:)]+)")


@dataclass(frozen=True)
class Piece:
    """A piece of text that a check can be made of, and where it stands."""

    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def markdown_files() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def config_files() -> list[Path]:
    folders = (ROOT / "configs", ROOT / "accelerate_configs")
    return [path for folder in folders for path in sorted(folder.glob("*.yaml"))]


def blocks(path: Path, language: str) -> Iterator[Piece]:
    """The fenced blocks of a language."""
    text = path.read_text("utf-8")
    for found in FENCE.finditer(text):
        if found[2] == language:
            line = text.count("\n", 0, found.start(3)) + 1
            indent = found[1]
            lines = [row.removeprefix(indent) for row in found[3].splitlines()]
            yield Piece(str(path.relative_to(ROOT)), line, "\n".join(lines))


def commands(path: Path) -> Iterator[Piece]:
    """The commands of a Markdown file: lines of its shell blocks, and those within the text."""
    for block in blocks(path, "bash"):
        yield from joined_lines(block)
    for piece in prose(path):
        for inline in INLINE.findall(piece.text):
            if COMMAND.match(inline):
                yield Piece(piece.file, piece.line, inline)


def prose(path: Path) -> Iterator[Piece]:
    """The lines outside of fenced blocks."""
    text = path.read_text("utf-8")
    # as many lines as before, so that they keep their numbers
    without = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(without.splitlines(), 1):
        yield Piece(str(path.relative_to(ROOT)), number, line)


def joined_lines(block: Piece) -> Iterator[Piece]:
    """The commands of a shell block; one that goes on after a backslash is one."""
    begun, start = "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        start = start if begun else number
        begun += line
        if begun.endswith("\\"):
            begun = begun.removesuffix("\\") + " "
            continue
        if begun.strip() and not begun.lstrip().startswith("#"):
            yield Piece(block.file, start, begun.strip())
        begun = ""


def config_comments(path: Path) -> Iterator[Piece]:
    """The comments of a config; a command that goes on in a further line is one."""
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        _, hash_sign, comment = line.partition("#")
        if hash_sign:
            following = lines[number] if number < len(lines) else ""
            goes_on = comment.endswith("\\") or re.match(r"#\s+[a-z_]+\.[a-z_]+=", following)
            more = f" {following.lstrip('# ')}" if goes_on else ""
            text = comment.strip().removesuffix("\\").rstrip() + more
            yield Piece(str(path.relative_to(ROOT)), number, text)


def config_commands(path: Path) -> Iterator[Piece]:
    """The commands in a config's comments; `...` stands for the usual one."""
    for piece in config_comments(path):
        found = COMMAND.search(piece.text)
        if found and piece.text[: found.start()].rstrip().endswith((":", ".", "")):
            command = re.split(r"\s{2,}|;", piece.text[found.start() :])[0]
            yield Piece(piece.file, piece.line, command)


def overrides(pieces: Iterator[Piece]) -> Iterator[tuple[Piece, str, str]]:
    """Each section.key=value in them, with its path and its value."""
    for piece in pieces:
        for path, value in OVERRIDE.findall(piece.text):
            yield piece, path, value


def links(path: Path) -> Iterator[Piece]:
    """The targets of links to files, without what follows a #."""
    for piece in prose(path):
        for target in LINK.findall(piece.text):
            file = target.partition("#")[0]
            if file and "://" not in file:
                yield Piece(piece.file, piece.line, file)
