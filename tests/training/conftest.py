"""Fixtures of the tests of the training."""

from tests.shared.pretended_runs import sources
from tests.shared.scripted_validations import held_out, script
from tests.shared.small_runs import measured_quickly
from tests.shared.unets import coloured
