"""Kohya's format of LoRA files, which sd-scripts, A1111 and ComfyUI read.

Its names are, for most families, those of the model's first release, where one layer may hold
several of diffusers' layers as its rows. Which is which stands in the families' facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.base_layers import adaptable_layers
from trainers.lora.names import (
    base_architecture,
    diffusers_rows,
    released_rows,
    text_encoder_layers,
    underscored,
)
from trainers.lora.released_unet import unet_rows
from trainers.lora.update import (
    Layers,
    Lora,
    Rows,
    is_dora,
    is_lycoris,
    stack_updates,
    swap_halves,
)
from trainers.tensor_file import write_tensors

SUFFIX = ".safetensors"

# The first text encoder has a number where a model has several; all readers take both spellings.
FIRST_TEXT_ENCODER = ("lora_te_", "lora_te1_")


def layer_names(family: Family) -> dict[str, Rows]:
    """Every name that a layer of the base has in such files."""
    layers = adaptable_layers(family)
    facts = family.facts.kohya
    # the names of diffusers too, which other programs write
    rows = diffusers_rows(layers, facts.denoiser) | released_rows(layers, facts)
    names = underscored(facts.prefixes[facts.denoiser], rows)
    names |= written_names(family, layers)
    for first in family.clip_encoders[:1]:
        for layer in text_encoder_layers(family, layers)[first]:
            for prefix in FIRST_TEXT_ENCODER:
                names |= underscored(prefix, {layer: Rows((f"{first}.{layer}",))})
    return names


def written_names(family: Family, layers: Layers) -> dict[str, Rows]:
    """The one name of each layer, or of layers that are its rows, in a file that we write."""
    facts = family.facts.kohya
    if facts.released_unet:
        rows = unet_rows(layers, facts.denoiser)
    else:
        rows = released_rows(layers, facts)
    names = underscored(facts.prefixes[facts.denoiser], rows)
    for encoder, own in text_encoder_layers(family, layers).items():
        rows = {layer: Rows((f"{encoder}.{layer}",)) for layer in own}
        names |= underscored(facts.prefixes[encoder], rows)
    return names


def write(lora: Lora, family: Family, path: Path, metadata: dict[str, str]) -> None:
    """The file, with the ss_ and sshs_ keys by which sd-scripts and A1111 know it.

    Raises: UserError for DoRA.
    """
    if is_dora(lora):
        raise UserError(
            "this is DoRA, which kohya's format cannot hold: programs divide its dora_scale by "
            "other norms (ComfyUI by that of the base's rows, LyCORIS by that of the changed "
            "ones), so no number is right for all. Write it with --format merged, diffusers or peft"
        )
    kohya = family.facts.kohya
    layers = adaptable_layers(family)
    names = written_names(family, layers)
    module, arguments = kohya.network_module, {}
    if is_lycoris(lora):
        module, arguments = "lycoris.kohya", {"algo": next(iter(lora.values())).kind}
        state = to_lycoris(lora, names, kohya.by_default)
    else:
        state = to_kohya(lora, layers, names)
    ranks = {update.rank for update in lora.values()}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    version = kohya.base_model_version
    if not isinstance(version, str):
        version = version[base_architecture(family)]
    own = {
        "ss_v2": "False",
        "ss_base_model_version": version,
        "ss_network_module": module,
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": json.dumps(arguments),
    }
    content = save(state, own)
    # a safetensors file begins with the length of its header, after which the tensors come
    start = 8 + int.from_bytes(content[:8], "little")
    own["sshs_model_hash"] = hashlib.sha256(memoryview(content)[start:]).hexdigest()
    own["sshs_legacy_hash"] = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    # the copy is as large as the file
    del content
    write_tensors(state, path, metadata | own)


def to_kohya(lora: Lora, layers: Layers, names: Mapping[str, Rows]) -> dict[str, Tensor]:
    """The tensors of a kohya file; alpha is the rank."""
    state = {}
    for stem, rows in names.items():
        updates = [lora.get(part) for part in rows.layers]
        if not any(updates):
            continue
        if rows.swaps_halves:
            updates = [swap_halves(update) for update in updates]
        update = stack_updates(updates, [layers[part] for part in rows.layers])
        state[f"{stem}.lora_down.weight"] = update.a.contiguous()
        state[f"{stem}.lora_up.weight"] = update.b.contiguous()
        state[f"{stem}.alpha"] = torch.tensor(float(update.rank))
    return state


def to_lycoris(lora: Lora, names: Mapping[str, Rows], has_own_names: bool) -> dict[str, Tensor]:
    """The tensors of LoKr or LoHa; alpha is the rank.

    Where programs know diffusers' names as well they are those, without an alpha, which diffusers
    does not know: a layer of the release may be several of its, and such an update is of one.
    """
    stems = {rows.layers[0]: stem for stem, rows in names.items()} if has_own_names else {}
    state = {}
    for layer, update in lora.items():
        stem = stems.get(layer, layer)
        for name, tensor in update.tensors.items():
            state[f"{stem}.{name}"] = tensor.contiguous()
        if has_own_names:
            state[f"{stem}.alpha"] = torch.tensor(float(update.rank))
    return state
