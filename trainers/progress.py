"""How far a piece of work is: a bar on a terminal, and a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator
from datetime import datetime, timedelta
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

DEFAULT_COLUMNS = 100
LINE_SECONDS = 30.0  # between two lines about the same work


def is_terminal() -> bool:
    """Whether a person watches: a file, a pipe or a scheduler's log would keep every redrawing."""
    return sys.stderr.isatty()


def track(items: Collection[Item], label: str, disable: bool = False) -> Iterator[Item]:
    """The items, while it is shown how many of them are done.

    Without a terminal what is over within LINE_SECONDS is not told at all.
    """
    if disable:
        yield from items
    elif is_terminal():
        yield from tqdm(items, label, leave=False, delay=0.5, **bar_width())
    else:
        yield from track_by_lines(items, label)


def bar_width() -> dict[str, int | bool]:
    """tqdm's options for a bar as wide as the terminal; some terminals do not know their width, and
    tqdm would draw nothing on them."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": DEFAULT_COLUMNS, "nrows": 25}


def track_by_lines(items: Collection[Item], label: str) -> Iterator[Item]:
    start = told_at = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        is_last = number == len(items) and told_at > start
        if now - told_at >= LINE_SECONDS or is_last:
            told_at = now
            done, seconds = f"{label}: {number} of {len(items)}", now - start
            left = seconds / number * (len(items) - number)
            rest = f", about {format_seconds(left)} left" if left else ""
            write_line(f"{done} in {format_seconds(seconds)}{rest}")


def write_line(text: str) -> None:
    """A line on stderr that begins with the time of day."""
    print(f"{datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Such as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))
