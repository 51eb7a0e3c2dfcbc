"""What the scripts share: exit statuses, and quiet libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable

from . import Interrupted, UserError


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


def silence() -> None:
    """Keep the libraries' notices out of the progress line."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
