"""The names of a U-Net's layers in Stable Diffusion's first release, by ComfyUI and LyCORIS."""

from __future__ import annotations

from collections.abc import Iterable

from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.names import component_layers, underscored
from trainers.lora.update import Rows
from trainers.original.unet import released_names


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the denoiser has in such files; none if it is no U-Net."""
    rows = unet_rows(adaptable_layers(family), family.denoiser_name)
    dotted = {f"diffusion_model.{name}": value for name, value in rows.items()}
    return dotted | underscored("lora_unet_", rows)


def unet_rows(layers: Iterable[str], part: str) -> dict[str, Rows]:
    """The release's name of each layer of the component `part`, a U-Net."""
    names = released_names(component_layers(layers, part))
    return {name: Rows((f"{part}.{layer}",)) for name, layer in names.items()}
