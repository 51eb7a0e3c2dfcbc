"""Fixtures of the tests of LoRA files."""

from tests.shared.saved_loras import made
