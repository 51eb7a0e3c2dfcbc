"""What the base's layers are called: by diffusers, and by a model's first release."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trainers.config.family_facts import KohyaBlock, KohyaFacts
from trainers.families import Family
from trainers.lora.update import Rows

TEXT_LEVEL = "text_model."  # which transformers 5 left out of CLIPTextModel's names


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


def rename(layers: Iterable[str], blocks: Iterable[KohyaBlock]) -> dict[str, list[str]]:
    """Each other name of layers of the denoiser, and the layers that are its rows.

    Layers that are in none of `blocks` keep their names.
    """
    other_by_part = {}
    for block in blocks:
        for name, parts in block.rows().items():
            other_by_part |= {part: (name, parts) for part in parts}
    names = {}
    for layer in layers:
        block = re.match(r"\w*blocks\.(\d+)", layer) if other_by_part else None
        number = block[1] if block else ""
        pattern = layer.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else layer
        other, parts = other_by_part.get(pattern, (pattern, [pattern]))
        names[other.replace("{}", number)] = [part.replace("{}", number) for part in parts]
    return names


def swapped_layers(layers: Iterable[str], facts: KohyaFacts) -> set[str]:
    """The layers whose output halves, scale and shift, diffusers has in the other order."""
    swapped = set()
    for pattern in facts.swapped_halves:
        start, last, end = f"{facts.denoiser}.{pattern}".partition("{last}")
        if not last:
            swapped.add(start)
            continue
        # {last} is the highest number of a block in this base model
        matching = [name for name in layers if name.startswith(start) and name.endswith(end)]
        numbers = [int(name[len(start) : -len(end)]) for name in matching]
        if numbers:
            swapped.add(f"{start}{max(numbers)}{end}")
    return swapped


def underscored(prefix: str, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The names as kohya writes them: a prefix, and underscores for dots."""
    return {prefix + name.replace(".", "_"): value for name, value in rows.items()}
