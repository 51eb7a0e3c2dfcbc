"""What the scripts share: exit statuses, the config of a finished run, quiet libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from . import Interrupted, UserError
from .config import parse, validate
from .sections import Config


def exit_status(main: Callable[[], int | None]) -> int:
    """Run `main` and return 0 or what it returns; 2 for the user's mistake, 130 or 143 for a signal."""
    try:
        return main() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"stopped by signal {stop.number}; the same command goes on from the checkpoint", file=sys.stderr)
        return 128 + stop.number


def finished(run: Path, kind: str) -> Config:
    """The config of a run folder, whose data may be gone. Raises: UserError when it is none of that kind."""
    try:
        config, _ = validate(parse((run / "config.yaml").read_text()))
    except OSError:
        raise UserError(f"{run} is no run folder: it has no config.yaml") from None
    if config.kind != kind:
        raise UserError(f"{run} is a run of {config.kind}, not of {kind}")
    if kind != "dreambooth" and not (run / "model").is_dir():
        raise UserError(f"{run} is not finished: it has no model")
    return config


def silence() -> None:
    """Keep the libraries' notices out of the progress line."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
