"""Fixtures of the tests of a folder of pictures."""

from tests.shared.pictures import put
