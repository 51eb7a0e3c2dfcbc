"""What the user can mend, what failed around a run, and what is only worth a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """What the user can mend; scripts print its message and exit with its status."""

    status = 2


class RunFailedError(UserError):
    """Memory, disk, network or another process failed: no mistake in the config, and nothing to
    mend in the code."""

    status = 1


class Interrupted(BaseException):
    """A signal asked the process to stop; scripts exit with status 128 + number.

    advice: what is left, and how to go on, where that is known.
    """

    def __init__(self, signal_number: int, advice: str = "") -> None:
        super().__init__(signal_number, advice)
        self.signal_number = signal_number
        self.advice = advice

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"stopped by signal {self.signal_number}{advice}"


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """A failure of what training does not need is told, and training goes on."""
    try:
        yield
    except Exception as error:  # trackers and their servers raise whatever they like
        warnings.warn(
            f"{what} failed ({type(error).__name__}: {error}); training goes on", stacklevel=3
        )


def name_some(names: Sequence[str], most: int = 5) -> str:
    """A handful of names for a message, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
