"""The fixtures of shared/ that these tests ask for."""

from tests.shared.captioners import blip
