"""The names of SimpleTuner's LyCORIS files: those of diffusers' denoisers with underscores."""

from __future__ import annotations

from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.names import component_layers, underscored
from trainers.lora.update import Rows


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the base has in such files."""
    part = family.denoiser_name
    layers = component_layers(adaptable_layers(family), part)
    return underscored("lycoris_", {layer: Rows((f"{part}.{layer}",)) for layer in layers})
