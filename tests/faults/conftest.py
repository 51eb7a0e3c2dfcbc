"""Fixtures of the tests of a disturbed run."""

from tests.shared.disturbed_runs import disk, disturb, finished, make, short, warning_text
