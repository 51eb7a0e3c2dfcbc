"""Check how long a file, a function, a family and a trainer may be; exit status 1 if one is longer.

python scripts/guides.py [FOLDER ...] [--statistics]
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("trainers", "scripts", "tests")
FILE, FUNCTION, FAMILY, TRAINER = 300, 50, 80, 200  # lines
TRAINERS = ("dreambooth", "autoencoder", "gan", "unet")


def source_files(folders: Sequence[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def longest_allowed(path: Path) -> int:
    # beside the file with a family's equations lies the one with its facts
    if path.parent.name == "families" and path.with_suffix(".yaml").exists():
        return FAMILY
    return TRAINER if path.parent == ROOT / "trainers" and path.stem in TRAINERS else FILE


def violations(path: Path) -> Iterator[str]:
    """What is too long in a file, each as FILE:LINE: MESSAGE."""
    text, name = path.read_text("utf-8"), path.relative_to(ROOT)
    lines, allowed = len(text.splitlines()), longest_allowed(path)
    if lines > allowed:
        yield f"{name}:1: {lines} lines, {allowed} are allowed"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, not {FUNCTION}"


def statistics(paths: list[Path]) -> str:
    """Tokens per line, comments per 100 lines, and how many of 1000 lines are over 100 wide."""
    tokens, comments, lines, wide = 0, 0, set(), 0
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for path in paths:
        text = path.read_text("utf-8")
        wide += sum(len(line) > 100 for line in text.splitlines())
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type not in skipped:
                tokens += 1
                lines.update((path, row) for row in range(token.start[0], token.end[0] + 1))
    count = max(1, len(lines))
    return (
        f"{tokens / count:.1f} tokens a line, {100 * comments / count:.1f} comments per 100 lines, "
        f"{1000 * wide / count:.0f} of 1000 lines over 100 characters, {count} lines of code"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", help=f"By default {' and '.join(FOLDERS)}.")
    help = "Also print tokens per line, comments and wide lines."
    parser.add_argument("--statistics", action="store_true", help=help)
    arguments = parser.parse_args()
    folders = arguments.folders or FOLDERS
    paths = source_files(folders)
    found = [line for path in paths for line in violations(path)]
    print("\n".join(found) or "the guides hold")
    if arguments.statistics:
        for folder in folders:
            print(f"{folder}: {statistics(source_files([folder]))}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
