"""The charts of a report show the numbers that were measured."""

import re

import numpy as np
import pytest

from tests.shared.reports import check_curves, read_back
from trainers.publishing.charts import line_charts, smooth, ticks

SHAPES = {
    "falls over four decades": 10 ** -np.linspace(-1, 3, 60),
    "changes sign": np.sin(np.arange(60)) * 7,
    "one far away": np.r_[np.ones(59), 900],
    "one near zero": np.r_[np.ones(59), 1e-9],
    "constant": np.full(60, 1e-4),
    "zero": np.zeros(60),
    "large": 1e5 + np.arange(60) ** 2.0,
    "with zeros and far away": np.r_[np.zeros(50), np.full(10, 1e4)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_curve_is_read_back_from_its_axes_as_it_was_measured(shape):
    rows = [{"step": 10 * i + 10, "value": float(value)} for i, value in enumerate(SHAPES[shape])]
    check_curves(line_charts(rows, "step"), rows, "step")


def test_a_loss_that_falls_over_four_decades_is_readable_at_its_end():
    ys = SHAPES["falls over four decades"]
    page = line_charts([{"step": i, "value": float(y)} for i, y in enumerate(ys)], "step")
    assert np.allclose(read_back(page)["value"]["value"][:, 1], ys, rtol=0.01)


def test_what_is_logged_less_often_or_is_no_number_is_left_out_where_it_lacks():
    rows = [
        {"step": i, "a_loss": 1.0 + i, "b_loss": 2.0 - i, "order": None if i % 3 else 0.1 * i}
        for i in range(1, 30)
    ]
    rows[7]["a_loss"], rows[7]["note"] = float("nan"), "text"
    page = line_charts(rows, "step")
    del rows[7]["a_loss"]
    check_curves(page, rows, "step")
    assert list(read_back(page)) == ["loss", "order"]
    assert list(read_back(page)["loss"]) == ["a", "b"]


@pytest.mark.parametrize("half", [1, 4])
def test_the_strong_line_is_the_mean_of_as_many_on_both_sides(half):
    ys = np.random.default_rng(0).normal(size=30)
    got = smooth([(float(i), float(y)) for i, y in enumerate(ys)], half)
    assert [x for x, _ in got] == list(range(30))
    inner = np.convolve(ys, np.full(2 * half + 1, 1 / (2 * half + 1)), "valid")
    assert np.allclose([y for _, y in got][half:-half], inner)
    assert [got[0][1], got[1][1]] == pytest.approx([ys[0], ys[:3].mean()])  # a steep start is kept
    assert got[-1][1] == pytest.approx(
        ys[-1 - half :].mean()
    )  # the last is no better known than its neighbours


def test_only_many_points_that_jump_about_are_smoothed():
    noise, steady = np.random.default_rng(0).normal(size=100), np.linspace(0, 1, 100) ** 2
    strong = {}
    for name, ys in {"noise": noise, "steady": steady, "few": noise[:20]}.items():
        page = line_charts([{"step": i, name: float(y)} for i, y in enumerate(ys)], "step")
        lines = re.findall('<polyline class="raw( faint)?"', page)
        strong[name] = (lines, page.count("<polyline"))
    assert strong == {"noise": ([" faint"], 2), "steady": ([""], 1), "few": ([""], 1)}


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 800), (1e-9, 3e-9), (5, 5), (0, 0), (-2, -2), (99.9, 100.1)]
)
def test_labels_are_few_equally_spaced_and_hold_all_values(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-6 * abs(low)
    assert marks[-1] >= high - 1e-6 * abs(high)
    assert 2 <= len(marks) <= 7
    assert np.allclose(np.diff(marks), marks[1] - marks[0])
