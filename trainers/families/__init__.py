"""Model families by their name in a config. A new one is a file here and a line below."""

from .base import Condition, Family
from .sd15 import SD15

FAMILIES: dict[str, type[Family]] = {"sd15": SD15}

__all__ = ["FAMILIES", "SD15", "Condition", "Family"]
