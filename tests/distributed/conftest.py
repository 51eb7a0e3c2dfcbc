"""Fixtures of the tests of several processes."""

from tests.shared.deepspeed_runs import launched
from tests.shared.scripted_validations import held_out, script
