"""Line charts of a report: which metrics share one, and where their points and labels lie."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from markupsafe import Markup

from trainers.config.validation_metrics import HELD_OUT_LOSS, HELD_OUT_LOSSES
from trainers.publishing.html import is_finite_number, parts

Record = dict[str, Any]
Point = tuple[float, float]


class Area(NamedTuple):
    """The plot in a view box of 360 x 200."""

    left: int = 50
    right: int = 348
    top: int = 8
    bottom: int = 174


AREA = Area()

# The place of a chart among the others, which come in the order of the log.
BANDS_TITLE = "held_out_loss_by_noise"
CHART_ORDER = {"loss": -1, "learning_rate": 1, "grad_norm": 2}

NUM_COLORS = 6
MAX_DOTS = 20  # a line of more points is drawn without a dot at each


@dataclass(frozen=True)
class Line:
    """One metric in a chart; places are in the view box."""

    name: str
    color: int
    points: list[Point]
    smooth: list[Point]  # the running mean; empty where the line does not need one
    last: float

    @property
    def has_dots(self) -> bool:
        return len(self.points) <= MAX_DOTS


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis; a tick is its place and its value."""

    title: str
    x_name: str
    lines: list[Line]
    x_range: Point
    y_range: Point
    is_log: bool
    x_ticks: list[Point]
    y_ticks: list[Point]
    mark: float | None  # a place on the x axis
    area: Area = AREA


def line_charts(rows: Sequence[Record], x: str, mark: float | None = None) -> Markup:
    """A chart of each metric of the rows against `x`.

    The losses of all players share one chart, and so do their gradient norms, and the held-out
    losses of the thirds of the schedule.
    """
    grouped: dict[str, dict[str, list[Point]]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != x):
        points = finite_points(rows, x, name)
        match = re.fullmatch("(.+)_(loss|grad_norm)", name)
        label, title = match.groups() if match else (name, name)
        if name in HELD_OUT_LOSSES[1:]:
            label, title = name.removeprefix(f"{HELD_OUT_LOSS}_"), BANDS_TITLE
        if points:
            grouped.setdefault(title, {})[label] = points
    titles = sorted(grouped, key=lambda title: CHART_ORDER.get(title, 0))
    return parts.charts([make_chart(title, grouped[title], x, mark) for title in titles])


def finite_points(rows: Sequence[Record], x: str, y: str) -> list[Point]:
    """The rows' points (x, y), sorted, without those that lack a finite number."""
    points = []
    for row in rows:
        if is_finite_number(row.get(x)) and is_finite_number(row.get(y)):
            points.append((row[x], row[y]))
    return sorted(points)


def make_chart(
    title: str, series: dict[str, list[Point]], x_name: str, mark: float | None = None
) -> Chart:
    """A chart of each name's points (x, y).

    The y axis is logarithmic where most of the values would otherwise lie flat at the bottom.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(xs), max(xs)
    is_log = min(ys) > 0 and max(ys) > 10 * median(ys)
    y_values = log_ticks(min(ys), max(ys)) if is_log else ticks(min(ys), max(ys))
    to_x = make_scale(low, high, AREA.left, AREA.right)
    to_y = make_scale(y_values[0], y_values[-1], AREA.bottom, AREA.top, is_log)

    def place(points: Sequence[Point]) -> list[Point]:
        return [(to_x(x), to_y(y)) for x, y in points]

    lines = []
    for i, (name, points) in enumerate(series.items()):
        radius = smoothing_radius(points)
        smoothed = place(smooth(points, radius)) if radius else []
        lines.append(Line(name, i % NUM_COLORS, place(points), smoothed, points[-1][1]))
    has_mark = is_finite_number(mark) and low <= mark <= high
    return Chart(
        title=title,
        x_name=x_name,
        lines=lines,
        x_range=(low, high),
        y_range=(y_values[0], y_values[-1]),
        is_log=is_log,
        x_ticks=[(to_x(value), value) for value in ticks(low, high) if low <= value <= high],
        y_ticks=[(to_y(value), value) for value in y_values],
        mark=to_x(mark) if has_mark else None,
    )


def smoothing_radius(points: Sequence[Point]) -> int:
    """How many neighbors on either side the running mean takes.

    Zero where the points are few or do not jump about.
    """
    slopes = [b - a for (_, a), (_, b) in pairwise(points)]
    turns = sum(a * b < 0 for a, b in pairwise(slopes))
    return min(len(points) // 24, 40) if turns > len(points) / 4 else 0


def smooth(points: Sequence[Point], radius: int) -> list[Point]:
    """The running mean of 2 radius + 1 neighbors.

    At the start it takes fewer, to keep a steep one; at the end those on the left alone.
    """
    ys = [y for _, y in points]
    smoothed = []
    for i, (x, _) in enumerate(points):
        span = min(radius, i)
        smoothed.append((x, fmean(ys[i - span : i + span + 1])))
    return smoothed


def make_scale(
    low: float, high: float, start: float, end: float, log: bool = False
) -> Callable[[float], float]:
    """The function from a value in [low, high] to a place in [start, end]."""
    f = math.log if log else float
    # a single value lies at the start
    width = (f(high) - f(low)) or 1
    return lambda value: start + (end - start) * (f(value) - f(low)) / width


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` or less to `high` or more, about five."""
    if low == high:
        low -= (abs(low) or 1) / 2
        high += (abs(high) or 1) / 2
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    # the slack forgives the rounding of low / step
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` or less to `high` or more, at most six."""
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    return [10.0**exponent for exponent in range(first, last + every, every)]
