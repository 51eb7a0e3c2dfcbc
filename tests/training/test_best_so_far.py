"""Which validation is the best, and how long none was better."""

import math

import pytest

from trainers.config import KINDS
from trainers.config.validation_metrics import DIRECTIONS, HIGHER, LOWER
from trainers.training.best_weights import BestSoFar

NAN, INF = math.nan, math.inf


def follow(metric, values, min_delta=0.0):
    """The best step and the validations without an improvement, after each value."""
    best, seen = BestSoFar(), []
    for step, value in enumerate(values, 1):
        best.record(step, value, metric, min_delta)
        seen.append((best.step, best.waited))
    return seen


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 2, 1], [(1, 0), (2, 0), (3, 0)]),
        # an equal value is not better
        ([1, 1, 2], [(1, 0), (1, 1), (1, 2)]),
        ([NAN, NAN, 5, NAN], [(0, 1), (0, 2), (3, 0), (3, 1)]),
        ([INF, 4, -INF], [(1, 0), (2, 0), (3, 0)]),
    ],
)
@pytest.mark.parametrize("metric", ["held_out_loss", "held_out_psnr"])
def test_the_best_is_the_first_of_the_lowest_or_of_the_highest(metric, values, expected):
    sign = -1 if DIRECTIONS[metric] == HIGHER else 1
    assert follow(metric, [sign * value for value in values]) == expected


def test_a_slow_rise_is_the_best_before_it_is_an_improvement():
    values = [1.0, 1.3, 1.6, 1.9, 2.2]
    assert follow("held_out_psnr", values, min_delta=1.0) == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 3),
        (5, 0),
    ]


def test_each_metric_of_each_kind_has_a_direction():
    for model in KINDS.values():
        assert set(model().validation_metrics) <= DIRECTIONS.keys()
    assert set(DIRECTIONS.values()) == {LOWER, HIGHER}
