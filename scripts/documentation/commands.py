"""Whether a command of the documents can be given: its script, its options and its overrides."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

from documentation.code_blocks import ROOT
from trainers.config.loading import apply_override, read_tree, validate
from trainers.errors import UserError

# words that stand for what the reader has
PLACEHOLDER = re.compile(r"\.\.\.|\bNAME\b|[A-Z]{3,}")
# what is not there before the reader has made it, and packages that not everybody has
NOT_HERE = re.compile(r"no such folder|is not installed|pip install")
OTHER_PROGRAMS = "git pip hf export cd docker bash nohup apt-get LD_PRELOAD".split()
PARSERS = ("parse_args", "parse_known_intermixed_args")


class ParsedError(Exception):
    """The command line of a script was parsed; what would follow is left out."""


def variants(command: str) -> list[str]:
    """A command as it can be typed: without its [optional parts], and with each of them."""
    if re.search(r"=\[", command) or "[" not in command:
        return [command]
    plain = re.sub(r"\s*\[[^\]]*\]", "", command)
    options = [part for found in re.findall(r"\[([^\]]*)\]", command) for part in found.split("|")]
    return [plain, *(f"{plain} {option.strip()}" for option in options if option != "...")]


def command_mistakes(command: str) -> list[str]:
    """What is wrong with a command; nothing where it can be given."""
    mistakes = []
    for variant in variants(command):
        try:
            words = shlex.split(variant, comments=True)
        except ValueError as error:
            return [f"it cannot be parsed: {error}"]
        mistakes += check_words(words)
    return list(dict.fromkeys(mistakes))


def check_words(words: Sequence[str]) -> Iterator[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    if program == "make":
        yield from (f"make has no target {name}" for name in arguments if name not in targets())
    elif program == "accelerate":
        yield from launch_mistakes(arguments)
    elif program == "pytest":
        yield from missing_files(arguments)
    elif program == "sbatch":
        yield from missing_files(arguments[:1])
        yield from script_mistakes("scripts/train.py", arguments[1:])
    elif program == "python" and arguments[:1] == ["-m"]:
        yield from module_mistakes(*arguments[1:])
    elif program == "python" and arguments and arguments[0] != "-c":
        yield from script_mistakes(arguments[0], arguments[1:])
    elif program not in OTHER_PROGRAMS and program != "python":
        yield f"{program} is no program that the documents use"


@cache
def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))


FOLDERS = ("tests/", "scripts/", "configs/", "accelerate_configs/", "docs/")


def missing_files(words: Sequence[str]) -> Iterator[str]:
    """The words that look like files of the repository and are none; what is written need not be
    there."""
    for before, word in zip(["", *words], words, strict=False):
        path = word.partition("::")[0]
        is_file = path.startswith(FOLDERS) and not PLACEHOLDER.search(path)
        if is_file and before != "--out" and not (ROOT / path).exists():
            yield f"{path} does not exist"


def module_mistakes(module: str, *arguments: str) -> Iterator[str]:
    path = ROOT / f"{module.replace('.', '/')}.py"
    if module.startswith("trainers") and not path.is_file():
        yield f"the module {module} does not exist"
    yield from missing_files(arguments)


def launch_mistakes(words: Sequence[str]) -> Iterator[str]:
    """`accelerate launch [its options] SCRIPT [the script's arguments]`."""
    from accelerate.commands.launch import launch_command_parser

    if words[:1] != ["launch"] or len(words) == 1:
        return
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            known = launch_command_parser().parse_args(list(words[1:]))
        except SystemExit:
            yield f"accelerate: {told.getvalue().strip().splitlines()[-1:]}"
            return
    if known.config_file:
        yield from missing_files([known.config_file])
    # the ellipsis stands for a script and its config
    if known.training_script != "...":
        yield from script_mistakes(known.training_script, known.training_script_args)


def unknown_flags(script: str, text: str, words: Sequence[str]) -> Iterator[str]:
    """Options that stand neither in a script nor in what it imports of tests/shared."""
    for name in re.findall(r"^from tests\.shared\.(\w+) import", text, re.MULTILINE):
        text += (ROOT / f"tests/shared/{name}.py").read_text("utf-8")
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    yield from (f"{script} has no {flag}" for flag in flags if f'"{flag}"' not in text)


def script_mistakes(script: str, words: Sequence[str]) -> Iterator[str]:
    """What the script's own parser says, and the config that it is given."""
    if PLACEHOLDER.search(script):
        return
    path = ROOT / script
    path = path / "__main__.py" if path.is_dir() else path
    if not path.is_file():
        yield f"{script} does not exist"
        return
    if not words:
        # the text speaks of the script
        return
    yield from missing_files(words)
    text = path.read_text("utf-8")
    if "run_main(main)" not in text:
        # it might do its work before it parses its options
        yield from unknown_flags(script, text, words)
        return
    # the ellipsis stands for further words, but for a value after an option
    pairs = zip(["", *words], words, strict=False)
    words = [word for before, word in pairs if word != "..." or before.startswith("--")]
    arguments, told = parse(path, words)
    if arguments is None:
        yield f"{script}: {told}"
    elif getattr(arguments, "config", None):
        yield from config_mistakes(arguments.config, arguments.overrides)


def parse(path: Path, words: Sequence[str]) -> tuple[argparse.Namespace | None, str]:
    """The arguments as the script's own parser reads them, without running the script; None, and
    the reason, where it refuses them."""
    found = []

    def stop_after(parse_method):
        def parse_and_stop(parser, *arguments, **options):
            found.append(parse_method(parser, *arguments, **options))
            raise ParsedError

        return parse_and_stop

    with contextlib.ExitStack() as stack:
        told = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *words]))
        folder = path.parent.parent if path.stem == "__main__" else path.parent
        stack.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))
        # signals stay as they are, and what is raised comes here
        stack.enter_context(mock.patch("trainers.cli.run_main", lambda main: main()))
        for name in PARSERS:
            method = getattr(argparse.ArgumentParser, name)
            patched = mock.patch.object(argparse.ArgumentParser, name, stop_after(method))
            stack.enter_context(patched)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except ParsedError:
            pass
        except SystemExit:
            return None, told.getvalue().strip().splitlines()[-1]
    result = found[-1]
    arguments, unknown = result if isinstance(result, tuple) else (result, [])
    options = [word for word in unknown if word.startswith("-")]
    if options:
        return None, f"unknown options {' '.join(options)}"
    if unknown:
        arguments.overrides += unknown
    return arguments, ""


def config_mistakes(path: str, overrides: Sequence[str]) -> list[str]:
    """What is wrong with a config and its overrides, apart from folders that the reader makes."""
    if PLACEHOLDER.search(path):
        return []
    try:
        tree = read_tree(ROOT / path)
    except UserError as error:
        return [str(error)]
    told = [apply_override(tree, override) for override in overrides]
    _, mistakes = validate(tree, needs_pictures=False)
    mistakes = [message for message in (*told, *mistakes) if message]
    return [message for message in mistakes if not NOT_HERE.search(message)]
