"""OneTrainer's names of a transformer's layers: diffusers', with underscores for dots."""

from __future__ import annotations

from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.names import diffusers_rows, underscored
from trainers.lora.update import Rows


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the denoiser has in such files; text encoders have kohya's."""
    part = family.denoiser_name
    return underscored(f"lora_{part}_", diffusers_rows(adaptable_layers(family), part))
