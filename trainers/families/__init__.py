"""Model families by their name in a config. A new one is two files here, NAME.py and NAME.yaml."""

from __future__ import annotations

from pathlib import Path

from trainers.config.dreambooth_rules import base_problem, is_single_file
from trainers.errors import UserError
from trainers.families.base import FAMILIES, Family
from trainers.original.checkpoint import read_checkpoint

__all__ = ["FAMILIES", "Family", "detect_family"]


def detect_family(base: str) -> str:
    """The name of the family that trains a base model, found by its pipeline's class.

    base: a folder or a name on the Hub. Raises: UserError.
    """
    from diffusers import DiffusionPipeline

    if problem := base_problem(base):
        raise UserError(f"--base: {problem}")
    if is_single_file(base):
        return read_checkpoint(Path(base))[0]
    try:
        kind = DiffusionPipeline.load_config(base)["_class_name"]
    except OSError as error:
        raise UserError(f"--base {base}: there is no diffusers pipeline ({error})") from None
    for name, family in FAMILIES.items():
        if family.pipeline.__name__ == kind:
            return name
    raise UserError(f"--base {base} is a {kind}, which is not a supported family")
