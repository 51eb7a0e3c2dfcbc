"""Fixtures of the tests of a GAN."""

from tests.shared.gans import settings
