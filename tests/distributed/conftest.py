"""Fixtures of the tests of several processes."""

from tests.shared.deepspeed_runs import launched
