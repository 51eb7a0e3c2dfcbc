"""Fixtures of the tests of a U-Net."""

from tests.shared.unets import coloured, settings
