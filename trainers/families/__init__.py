"""Model families by their name in a config. A new one is two files here, NAME.py and NAME.yaml."""

from __future__ import annotations

from trainers.errors import UserError
from trainers.families.base import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "detect_family"]


def detect_family(base: str) -> str:
    """The family of a base model, by its pipeline's class."""
    from diffusers import DiffusionPipeline

    try:
        kind = DiffusionPipeline.load_config(base)["_class_name"]
    except OSError as error:
        raise UserError(f"--base {base}: no pipeline there ({error})") from None
    for name, family in FAMILIES.items():
        if family.pipeline.__name__ == kind:
            return name
    raise UserError(f"--base {base} is a {kind}, which no family here uses")
