"""The names that XLabs' trainer gives to layers, which the families' facts state."""

from __future__ import annotations

from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.names import component_layers
from trainers.lora.update import Rows
from trainers.original.names import rename

PREFIXES = ("", "diffusion_model.")


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the base has in such files."""
    part = family.denoiser_name
    names = {}
    for name, layers in rename(
        component_layers(adaptable_layers(family), part), family.facts.xlabs
    ).items():
        # a layer that keeps its name is not one of XLabs'
        if name in layers:
            continue
        rows = Rows(tuple(f"{part}.{layer}" for layer in layers))
        names |= {prefix + name: rows for prefix in PREFIXES}
    return names
