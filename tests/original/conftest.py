"""Fixtures of the tests of models in one file."""

from tests.shared.saved_loras import made
from tests.shared.single_files import files
