"""What the base's layers are called: by diffusers, and by a model's first release."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trainers.config.family_facts import KohyaFacts
from trainers.families import Family
from trainers.lora.update import Rows
from trainers.original.names import rename, swapped_layers


def component_layers(layers: Iterable[str], component: str) -> list[str]:
    """The names of the layers of one component, without the component."""
    start = f"{component}."
    return [name.removeprefix(start) for name in layers if name.startswith(start)]


def text_encoder_layers(family: Family, layers: Iterable[str]) -> dict[str, list[str]]:
    """The names of the layers of each text encoder that LoRA can be on."""
    layers = list(layers)
    return {name: component_layers(layers, name) for name in family.clip_encoders}


def released_rows(layers: Iterable[str], facts: KohyaFacts) -> dict[str, Rows]:
    """The denoiser's layers as the model's first release names them.

    Most families have the same names in both.
    """
    layers = list(layers)
    names = rename(component_layers(layers, facts.denoiser), facts.blocks)
    swapped = swapped_layers(layers, facts)
    rows = {}
    for released, parts in names.items():
        full = tuple(f"{facts.denoiser}.{part}" for part in parts)
        # a swapped layer is never one of several rows
        rows[released] = Rows(full, full[0] in swapped)
    return rows


def underscored(prefix: str, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The names as kohya writes them: a prefix, and underscores for dots."""
    return {prefix + name.replace(".", "_"): value for name, value in rows.items()}
