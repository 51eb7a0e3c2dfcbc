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


def diffusers_rows(layers: Iterable[str], component: str) -> dict[str, Rows]:
    """The layers of a component by the names that they have in diffusers."""
    own = component_layers(layers, component)
    return {layer: Rows((f"{component}.{layer}",)) for layer in own}


def underscored(prefix: str, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The names as kohya writes them: a prefix, and underscores for dots."""
    return {prefix + name.replace(".", "_"): value for name, value in rows.items()}


def base_architecture(family: Family) -> str:
    """modelspec's id of the base model, told from its denoiser: a local folder has any name."""
    settings = family.denoiser_config
    for name, wanted in family.facts.architecture.items():
        # the last one wants nothing
        if all(settings.get(key) == value for key, value in wanted.items()):
            return name
    raise AssertionError("a family's last architecture has no conditions")
