"""How a model's tensors lie in the layout of its first release: names, rows, and what is turned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from trainers.config.family_facts import FamilyFacts, OriginalTextFacts
from trainers.original import unet, vae
from trainers.original.names import rename, swapped_layers

TEXT_LEVEL = "text_model."  # of CLIP's names, which transformers 5 left out of some
TIED, SHARED = "encoder.embed_tokens.weight", "shared.weight"  # two names of a T5's embedding

# OpenCLIP's names of what a layer of CLIP has, beside its joint queries, keys and values
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


class Change(Enum):
    """What is done to a tensor of diffusers to make that of the release."""

    NONE = auto()
    SWAPPED = auto()  # the two halves of its rows change places
    TURNED = auto()  # rows become columns
    KERNEL = auto()  # a matrix becomes a 1 x 1 convolution


@dataclass(frozen=True)
class OriginalTensor:
    """One tensor of the release: tensors of diffusers, which are its rows one after another."""

    name: str
    parts: tuple[str, ...]
    change: Change = Change.NONE

    def reorder(self, whole: Tensor) -> Tensor:
        """The tensor with its rows in the other order; twice gives it back."""
        match self.change:
            case Change.SWAPPED:
                return whole.roll(len(whole) // 2, 0)
            case Change.TURNED:
                return whole.T
        return whole

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The release's tensor of diffusers' tensors."""
        whole = self.reorder(torch.cat(list(parts)) if len(parts) > 1 else parts[0])
        if self.change is Change.KERNEL:
            whole = whole[:, :, None, None]
        return whole.contiguous()

    def split(self, whole: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor] | None:
        """The inverse of `join`; None where the parts would not have these shapes."""
        whole = self.reorder(whole)
        if self.change is Change.KERNEL:
            # some programs have saved it as a matrix
            whole = whole.flatten(1)
        rows = [shape[0] for shape in shapes]
        if whole.ndim == 0 or sum(rows) != len(whole):
            return None
        parts = [part.contiguous() for part in whole.split(rows)]
        fits = all(part.shape == shape for part, shape in zip(parts, shapes, strict=True))
        return parts if fits else None


def component_tensors(
    component: str, keys: Iterable[str], facts: FamilyFacts
) -> list[OriginalTensor]:
    """Where each tensor of a component of the pipeline is in a file, by its whole name there.

    keys: diffusers' names of the component's tensors.
    """
    single = facts.single_file
    if component == "vae":
        return prefixed(single.vae, vae_tensors(keys))
    if component == facts.kohya.denoiser:
        has_blocks = bool(facts.kohya.blocks)
        tensors = transformer_tensors(keys, facts) if has_blocks else unet_tensors(keys)
        return prefixed(single.denoiser, tensors)
    own = single.text_encoders[component]
    return prefixed(own.prefix, text_tensors(keys, own))


def prefixed(prefix: str, tensors: Iterable[OriginalTensor]) -> list[OriginalTensor]:
    return [OriginalTensor(prefix + one.name, one.parts, one.change) for one in tensors]


def unet_tensors(keys: Iterable[str]) -> list[OriginalTensor]:
    return by_layer(keys, unet.released_names)


def vae_tensors(keys: Iterable[str]) -> list[OriginalTensor]:
    tensors = []
    for tensor in by_layer(keys, vae.released_names):
        place, _, ending = tensor.name.rpartition(".")
        is_matrix = ".attn_1." in place and place.endswith(vae.CONVOLUTIONS) and ending == "weight"
        change = Change.KERNEL if is_matrix else Change.NONE
        tensors.append(OriginalTensor(tensor.name, tensor.parts, change))
    return tensors


def by_layer(
    keys: Iterable[str], released: Callable[[Iterable[str]], Mapping[str, str]]
) -> list[OriginalTensor]:
    """Tensors of layers whose names are `released`, with the endings that they have."""
    endings: dict[str, list[str]] = {}
    for key in keys:
        layer, _, ending = key.rpartition(".")
        endings.setdefault(layer, []).append(ending)
    tensors = []
    for name, layer in released(endings).items():
        for ending in endings[layer]:
            tensors.append(OriginalTensor(f"{name}.{ending}", (f"{layer}.{ending}",)))
    return tensors


def transformer_tensors(keys: Iterable[str], facts: FamilyFacts) -> list[OriginalTensor]:
    """By the tables of the family's facts: of layers, and of tensors that are no layer's."""
    left, tensors = list(keys), []
    for name, parts in rename(left, facts.single_file.tensors).items():
        if parts != [name]:
            tensors.append(OriginalTensor(name, tuple(parts)))
            left.remove(parts[0])
    for ending in ("weight", "bias"):
        layers = [key.removesuffix(f".{ending}") for key in left if key.endswith(f".{ending}")]
        full = [f"{facts.kohya.denoiser}.{layer}" for layer in layers]
        swapped = swapped_layers(full, facts.kohya)
        for name, parts in rename(layers, facts.kohya.blocks).items():
            is_swapped = f"{facts.kohya.denoiser}.{parts[0]}" in swapped
            change = Change.SWAPPED if is_swapped else Change.NONE
            rows = tuple(f"{part}.{ending}" for part in parts)
            tensors.append(OriginalTensor(f"{name}.{ending}", rows, change))
    return tensors


def text_tensors(keys: Iterable[str], facts: OriginalTextFacts) -> list[OriginalTensor]:
    """Of a text encoder by the names of transformers, or by OpenCLIP's."""
    keys = [key for key in keys if key != TIED]
    if not facts.open_clip:
        return [OriginalTensor(key, (key,)) for key in keys]
    tensors = []
    for key in keys:
        layer, found, inner = key.partition(".encoder.layers.")
        number, _, rest = inner.partition(".")
        place, _, ending = rest.rpartition(".")
        if not found:
            change = Change.TURNED if key == "text_projection.weight" else Change.NONE
            tensors.append(OriginalTensor(OPEN_CLIP_OUTER[key], (key,), change))
        elif place in OPEN_CLIP:
            name = f"transformer.resblocks.{number}.{OPEN_CLIP[place]}.{ending}"
            tensors.append(OriginalTensor(name, (key,)))
        elif place == "self_attn.q_proj":
            start = f"{layer}{found}{number}.self_attn"
            rows = tuple(f"{start}.{part}_proj.{ending}" for part in "qkv")
            name = f"transformer.resblocks.{number}.attn.in_proj_{ending}"
            tensors.append(OriginalTensor(name, rows))
    return tensors
