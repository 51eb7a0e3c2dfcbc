"""The names of a transformer's layers in its first release, by the facts of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainers.config.family_facts import KohyaBlock, KohyaFacts

NUMBERED = re.compile(r"\w+\.(\d+)\.")  # what is in a list of blocks, and the number of its block


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
        block = NUMBERED.match(layer) if other_by_part else None
        number = block[1] if block else ""
        pattern = layer.replace(f".{number}.", ".{}.", 1) if block else layer
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
