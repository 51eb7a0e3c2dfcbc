"""Fixtures of the tests of the trainers of small networks."""

from tests.shared.small_runs import kind, make, measured_quickly, undisturbed, whole
