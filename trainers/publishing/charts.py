"""Figures as HTML: curves as inline SVG, tiles, tables, galleries; styled by the page around
them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from statistics import fmean, median
from typing import Any

Record = dict[str, Any]


Point = tuple[float, float]


LEFT, RIGHT, TOP, BOTTOM = 50, 348, 8, 174  # the plot in a view box of 360 x 200


CHART_ORDER = {
    "loss": -1,
    "learning_rate": 1,
    "grad_norm": 2,
}  # of charts; the others stand between, as they come


LABELS = {
    "grad_norm": "gradient norm",
    "peak_memory_gib": "peak memory, GiB",
    "best": "best checkpoint",
    "net": "compared by",
    "prompt_net": "prompts read by",
    "photos": "compared with photos",
}


def line_charts(rows: Sequence[Record], x: str, mark: float | None = None) -> str:
    """A chart of each figure of the rows against `x`; the losses of all players share one, so do
    gradient norms."""
    charts: dict[str, dict[str, list[Point]]] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != x):
        points = sorted(
            (row[x], row[name])
            for row in rows
            if is_finite_number(row.get(x)) and is_finite_number(row.get(name))
        )
        match = re.fullmatch("(.+)_(loss|grad_norm)", name)
        label, title = match.groups() if match else (name, name)
        if points:
            charts.setdefault(title, {})[label] = points
    charts_html = [
        line_chart(title, charts[title], x, mark)
        for title in sorted(charts, key=lambda title: CHART_ORDER.get(title, 0))
    ]
    return f'<div class="charts">{"".join(charts_html)}</div>' if charts_html else ""


def line_chart(
    title: str, series: dict[str, list[Point]], x: str, mark: float | None = None
) -> str:
    """Each name's points (x, y), faint under their running mean where they are many and jump about.

    The y axis is logarithmic where most of the values would lie flat on the ground. mark: a place
    on the x axis.
    """
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    log = min(ys) > 0 and max(ys) > 10 * median(ys)
    marks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    to_x = make_scale(min(xs), max(xs), LEFT, RIGHT)
    to_y = make_scale(marks[0], marks[-1], BOTTOM, TOP, log)
    parts, keys = [], []
    for value in marks:
        y = to_y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(
            f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}" '
            f'text-anchor="end">{format_value(value, 9)}</text>'
        )
    for value in (tick for tick in ticks(min(xs), max(xs)) if min(xs) <= tick <= max(xs)):
        parts.append(
            f'<text class="x" x="{to_x(value):.1f}" y="193" '
            f'text-anchor="middle">{format_value(value, 9)}</text>'
        )
    if is_finite_number(mark) and min(xs) <= mark <= max(xs):
        parts.append(f'<path class="mark" d="M{to_x(mark):.1f} {TOP}V{BOTTOM}"/>')
    for i, (name, points) in enumerate(series.items()):
        radius, coordinates = (
            smoothing_radius(points),
            [f"{to_x(a):.1f},{to_y(b):.2f}" for a, b in points],
        )
        color, line = f'style="--c:var(--c{i % 6})"', " ".join(coordinates)
        faint = "raw faint" if radius else "raw"
        parts.append(
            f'<g {color}><polyline class="{faint}" data-name="{escape(name)}" points="{line}"/>'
        )
        if radius:
            line = " ".join(f"{to_x(a):.1f},{to_y(b):.2f}" for a, b in smooth(points, radius))
            parts.append(f'<polyline points="{line}"/>')
        if len(points) <= 20:
            parts += [
                '<circle cx="{}" cy="{}" r="2.6"/>'.format(*place.split(","))
                for place in coordinates
            ]
        parts.append("</g>")
        label = f"<i></i>{display_name(name)} " if len(series) > 1 else ""
        keys.append(f"<span {color}>{label}<b>{format_value(points[-1][1])}</b></span>")
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}"/>')
    scales = (
        f'data-x="{min(xs)} {max(xs)} 0" data-y="{marks[0]} {marks[-1]} {log:d}" '
        f'data-name="{escape(x)}"'
    )
    return (
        f'<figure class="chart"><figcaption><h3>{display_name(title)}</h3><span '
        f'class="at">{escape(x)} {format_value(max(xs))}</span>'
        f'</figcaption><div class="keys">{"".join(keys)}</div><svg viewBox="0 0 360 200" '
        f'role="img" '
        f'aria-label="{display_name(title)} against {escape(x)}" data-area="{LEFT} {RIGHT} {TOP} '
        f'{BOTTOM}" {scales}>'
        f"{''.join(parts)}</svg></figure>"
    )


def smoothing_radius(points: Sequence[Point]) -> int:
    """How many neighbours on either side the running mean takes; none where points are few or do
    not jump about."""
    slopes = [b - a for (_, a), (_, b) in pairwise(points)]
    turns = sum(a * b < 0 for a, b in pairwise(slopes))
    return min(len(points) // 24, 40) if turns > len(points) / 4 else 0


def smooth(points: Sequence[Point], radius: int) -> list[Point]:
    """The mean of 2 half + 1 neighbours; fewer at the start, to keep a steep one, and on the left
    alone at the end."""
    ys = [y for _, y in points]
    spans = (min(radius, i) for i in range(len(points)))
    return [
        (x, fmean(ys[i - n : i + n + 1]))
        for i, ((x, _), n) in enumerate(zip(points, spans, strict=True))
    ]


def make_scale(
    low: float, high: float, start: float, end: float, log: bool = False
) -> Callable[[float], float]:
    """From a value in [low, high] to a place in [start, end]."""
    f = math.log if log else float
    return lambda value: start + (end - start) * (f(value) - f(low)) / ((f(high) - f(low)) or 1)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` or less to `high` or more, about five."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` or less to `high` or more, at most six."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    return [10.0**e for e in range(first, last + every, every)]


def metric_tiles(values: Record, kind: str = "") -> str:
    """Figures in large."""
    items = (
        f'<div class="{kind}"><dt>{display_name(k)}</dt><dd>{format_value(v)}</dd></div>'
        for k, v in values.items()
    )
    return f'<dl class="tiles">{"".join(items)}</dl>' if values else ""


def metric_summary(values: Record) -> str:
    """Figures in large, what is said about them below."""
    notes = " · ".join(
        f"{display_name(k)}: {escape(v)}" for k, v in values.items() if isinstance(v, str)
    )
    return metric_tiles({k: v for k, v in values.items() if is_finite_number(v)}, "main") + (
        notes and f'<p class="note">{notes}</p>'
    )


def html_table(rows: Sequence[Record], best: str | None = None) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = "<tr>" + "".join(f"<th>{display_name(name)}</th>" for name in names) + "</tr>"
    for row in rows:
        cells = (
            f'<td data-name="{display_name(name)}">{format_value(row.get(name, "–"))}</td>'
            for name in names
        )
        mark = " class=best" if best and row.get("checkpoint") == best else ""
        body += f"<tr{mark}>{''.join(cells)}</tr>"
    return f'<div class="card rows"><table>{body}</table></div>' if rows else ""


def card_facts(card: str) -> str:
    """The model card's table of two columns."""
    rows = re.findall(r"^\| ([^|]*[^| ]) \| ([^|]*) \|$", card, re.MULTILINE)
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<div class="card facts"><table>{body}</table></div>' if rows else ""


def gallery(groups: Sequence[tuple[str, list[str]]]) -> str:
    """Captions and their pictures; those that could not be read are left out."""
    visible = [(caption, [tag for tag in tags if tag]) for caption, tags in groups]
    columns = min(4, max((len(tags) for _, tags in visible), default=0))
    figures_html = (
        f"<figure><div "
        f'class="row">{"".join(tags)}</div><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, tags in visible
        if tags
    )
    return (
        f'<div class="gallery" style="--n:{columns}">{"".join(figures_html)}</div>'
        if columns
        else ""
    )


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: object, digits: int = 4) -> str:
    """A number in so many digits, anything else as it is; safe in HTML."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(str(value))
    is_integer = isinstance(value, int) or (value.is_integer() and abs(value) < 1e7)
    text = f"{value:.0f}" if is_integer else f"{value:.{digits}g}"
    return re.sub("e([-+])0*", lambda match: "e" + match[1].strip("+"), text)


def display_name(name: str) -> str:
    """A figure's name for reading; safe in HTML."""
    return escape(LABELS.get(name, name.replace("_", " ")))
