"""Kohya's format of LoRA files, which sd-scripts, A1111 and ComfyUI read.

Its names are, for most families, those of the model's first release, where one layer may hold
several of diffusers' layers as its rows. Which is which stands in the families' facts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from trainers.config.family_facts import KohyaFacts
from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.update import Layers, Lora, LoraUpdate, split_update, stack_updates

SUFFIX = ".safetensors"
PREFIXES = ("lora_unet_", "lora_te")  # one of them begins each name in any family's file
TENSORS = {"lora_down.weight", "lora_up.weight", "alpha"}  # of a layer


def recognizes(path: Path) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, "pt") as opened:
        return any(key.startswith(PREFIXES) for key in opened.keys())  # noqa: SIM118


def read(path: Path, family: Family) -> tuple[Lora, list[str]]:
    return from_kohya(load_file(path), adaptable_layers(family), family.facts.kohya)


def write(lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
    """The file, with the ss_ and sshs_ keys by which sd-scripts and A1111 know it."""
    kohya = family.facts.kohya
    state = to_kohya(lora, adaptable_layers(family), kohya)
    ranks = {update.rank for update in lora.values()}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    own = {
        "ss_v2": "False",
        "ss_base_model_version": kohya.base_model_version,
        "ss_network_module": kohya.network_module,
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": "{}",
    }
    content = save(state, own)
    # a safetensors file begins with the length of its header, after which the tensors come
    start = 8 + int.from_bytes(content[:8], "little")
    own["sshs_model_hash"] = hashlib.sha256(content[start:]).hexdigest()
    own["sshs_legacy_hash"] = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    save_file(state, path, metadata | own)


def kohya_names(layers: Iterable[str], facts: KohyaFacts) -> dict[str, list[str]]:
    """Each of kohya's names, and the layers that are its rows."""
    released_by_part = {}
    for released, parts in facts.released_layers().items():
        released_by_part |= {part: (released, parts) for part in parts}
    names = {}
    for layer in layers:
        component, _, name = layer.partition(".")
        # only the denoiser's blocks were renumbered between the release and diffusers
        is_renamed = component == facts.denoiser and facts.blocks
        block = re.match(r"\w*blocks\.(\d+)", name) if is_renamed else None
        number = block[1] if block else ""
        pattern = name.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else name
        released, parts = released_by_part.get(pattern, (pattern, [pattern]))
        stem = facts.prefixes[component] + released.replace("{}", number).replace(".", "_")
        names[stem] = [f"{component}.{part.replace('{}', number)}" for part in parts]
    return names


def swapped_layers(layers: Layers, facts: KohyaFacts) -> set[str]:
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


def swap_halves(update: LoraUpdate) -> LoraUpdate:
    """The update with the two halves of its outputs in the other order."""
    b = update.b
    return LoraUpdate(update.a, b.roll(len(b) // 2, 0))


def to_kohya(lora: Lora, layers: Layers, facts: KohyaFacts) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha is the rank."""
    state = {}
    swapped = swapped_layers(layers, facts)
    for stem, parts in kohya_names(layers, facts).items():
        updates = [lora.get(part) for part in parts]
        if not any(updates):
            continue
        # a swapped layer is never one of several rows
        if parts[0] in swapped:
            updates = [swap_halves(update) for update in updates]
        update = stack_updates(updates, [layers[part] for part in parts])
        state[f"{stem}.lora_down.weight"] = update.a.contiguous()
        state[f"{stem}.lora_up.weight"] = update.b.contiguous()
        state[f"{stem}.alpha"] = torch.tensor(float(update.rank))
    return state


def from_kohya(
    state: Mapping[str, Tensor], layers: Layers, facts: KohyaFacts
) -> tuple[Lora, list[str]]:
    """The updates, and the names that belong to no layer of the base.

    Raises: UserError for what is not plain LoRA.
    """
    lora, unknown = {}, []
    names = kohya_names(layers, facts)
    swapped = swapped_layers(layers, facts)
    for stem, tensors in group_by_layer(state).items():
        if stem not in names:
            unknown.append(stem)
            continue
        parts = names[stem]
        updates = split_update(to_update(tensors), [layers[part] for part in parts])
        for part, update in zip(parts, updates, strict=True):
            if update:
                lora[part] = swap_halves(update) if part in swapped else update
    return lora, unknown


def group_by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of kohya's names. Raises: UserError for what is not plain LoRA."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, kind = key.partition(".")
        layers.setdefault(stem, {})[kind] = value.float()
    for stem, tensors in layers.items():
        if extra := tensors.keys() - TENSORS:
            raise UserError(
                f"{stem} has {', '.join(sorted(extra))}: only plain LoRA can be read, not LoHa, "
                "LoKr, OFT or DoRA"
            )
    return layers


def to_update(tensors: Mapping[str, Tensor]) -> LoraUpdate:
    """The update of one of kohya's names; without an alpha its scale is one."""
    a, b = tensors["lora_down.weight"], tensors["lora_up.weight"]
    if "alpha" in tensors:
        b = b * (tensors["alpha"].item() / len(a))
    return LoraUpdate(a, b)
