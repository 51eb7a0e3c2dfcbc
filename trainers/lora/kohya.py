"""Kohya's names of LoRA layers, which sd-scripts, A1111 and ComfyUI read.

For most families they are those of the model's first release, where one layer may hold several of
diffusers' as its rows. Which is which stands in the families' facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainers.config.family_facts import KohyaFacts
from trainers.errors import UserError
from trainers.lora.update import Layers, Lora, LoraUpdate, split_update, stack_updates


def kohya_names(layers: Iterable[str], facts: KohyaFacts) -> dict[str, list[str]]:
    """Every name in kohya's words to the layers that are its rows."""
    released_by_part = {}
    for released, parts in facts.released_layers().items():
        released_by_part |= {part: (released, parts) for part in parts}
    denoiser, names = next(iter(facts.prefixes)), {}
    for layer in layers:
        component, _, name = layer.partition(".")
        # only the denoiser's blocks were renumbered between the release and diffusers
        is_renamed = component == denoiser and facts.blocks
        block = re.match(r"\w*blocks\.(\d+)", name) if is_renamed else None
        number = block[1] if block else ""
        pattern = name.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else name
        released, parts = released_by_part.get(pattern, (pattern, [pattern]))
        stem = facts.prefixes[component] + released.replace("{}", number).replace(".", "_")
        names[stem] = [f"{component}.{part.replace('{}', number)}" for part in parts]
    return names


def swapped_layers(layers: Layers, facts: KohyaFacts) -> set[str]:
    """Layers whose output halves, scale and shift, diffusers has in the other order."""
    swapped, denoiser = set(), next(iter(facts.prefixes))
    for pattern in facts.swapped_halves:
        start, last, end = f"{denoiser}.{pattern}".partition("{last}")
        if not last:
            swapped.add(start)
            continue
        matching = [name for name in layers if name.startswith(start) and name.endswith(end)]
        numbers = [int(name[len(start) : -len(end)]) for name in matching]
        if numbers:
            swapped.add(f"{start}{max(numbers)}{end}")
    return swapped


def swap_halves(b: Tensor) -> Tensor:
    return b.roll(len(b) // 2, 0)


def to_kohya(lora: Lora, layers: Layers, facts: KohyaFacts) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha is the rank."""
    state, swapped = {}, swapped_layers(layers, facts)
    for stem, parts in kohya_names(layers, facts).items():
        if any(part in lora for part in parts):
            updates = [lora.get(part) for part in parts]
            if parts[0] in swapped:
                updates = [LoraUpdate(update.a, swap_halves(update.b)) for update in updates]
            update = stack_updates(updates, [layers[part] for part in parts])
            state[f"{stem}.lora_down.weight"] = update.a.contiguous()
            state[f"{stem}.lora_up.weight"] = update.b.contiguous()
            state[f"{stem}.alpha"] = torch.tensor(float(update.rank))
    return state


def from_kohya(
    state: Mapping[str, Tensor], layers: Layers, facts: KohyaFacts
) -> tuple[Lora, list[str]]:
    """The updates, and the names that no layer of the base answers to.

    Raises: UserError for what is not plain LoRA.
    """
    lora, unknown = {}, []
    names, swapped = kohya_names(layers, facts), swapped_layers(layers, facts)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, kind = key.partition(".")
        entries.setdefault(stem, {})[kind] = value.float()
    for stem, entry in entries.items():
        if extra := entry.keys() - {"lora_down.weight", "lora_up.weight", "alpha"}:
            raise UserError(
                f"{stem} has {', '.join(sorted(extra))}: only plain LoRA can be read, not its "
                f"relatives"
            )
        parts = names.get(stem)
        if parts is None:
            unknown.append(stem)
            continue
        a, b = entry["lora_down.weight"], entry["lora_up.weight"]
        b = b * (entry["alpha"].item() / len(a)) if "alpha" in entry else b
        for part, update in zip(
            parts, split_update(LoraUpdate(a, b), [layers[part] for part in parts]), strict=True
        ):
            if update:
                lora[part] = (
                    LoraUpdate(update.a, swap_halves(update.b)) if part in swapped else update
                )
    return lora, unknown
