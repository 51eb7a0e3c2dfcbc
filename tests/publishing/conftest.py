"""Fixtures of the tests of cards, pushes and reports."""

from tests.shared.pushed_runs import finished, hub, way
from tests.shared.reports import bare, runs
