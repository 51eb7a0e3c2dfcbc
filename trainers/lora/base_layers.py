"""The layers of a base model that LoRA can change: their names, and updates merged into them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextModel

from trainers.errors import UserError
from trainers.families import Family
from trainers.lora.low_rank import lora_from_difference
from trainers.lora.update import Layers, Lora


def text_prefix(module: nn.Module) -> str:
    """What files have before the names of a component's modules; empty for most components.

    transformers 5 dropped the level `text_model.` of CLIPTextModel, which ComfyUI and the readers
    of kohya's files need.
    """
    if not isinstance(module, CLIPTextModel):
        return ""
    has_level = "text_model" in dict(module.named_children())
    return "" if has_level else "text_model."


def name_prefix(component: str, module: nn.Module) -> str:
    """What stands before the name of a module of the component in a `Lora`."""
    return f"{component}.{text_prefix(module)}"


def adaptable_shapes(family: Family) -> dict[str, torch.Size]:
    """Every layer of the base that LoRA can be on, and its weight's shape; nothing is loaded."""
    parts = (family.denoiser_name, *family.clip_encoders)
    weights = adaptable_weights({part: family.meta_model(part) for part in parts})
    return {name: weight.shape for name, weight in weights.items()}


def adaptable_layers(family: Family) -> Layers:
    """Every layer of the base that LoRA can be on, and its outputs; no weights are loaded."""
    return {name: shape[0] for name, shape in adaptable_shapes(family).items()}


def loaded_weights(family: Family) -> dict[str, nn.Parameter]:
    """The weights of the loaded pipeline that LoRA can change."""
    parts = (family.denoiser_name, *family.clip_encoders)
    return adaptable_weights({part: getattr(family.pipe, part) for part in parts})


def adaptable_weights(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights that LoRA can change, by component and module."""
    weights = {}
    for part, module in parts.items():
        prefix = name_prefix(part, module)
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                weights[prefix + name] = layer.weight
    return weights


@torch.no_grad()
def merge_lora(family: Family, lora: Lora) -> float:
    """Add the updates to the loaded weights.

    Returns what rounding to the weights' precision loses, relative to the updates. Raises:
    UserError where a weight has no room for the sum.
    """
    weights = loaded_weights(family)
    lost = total = 0.0
    for name, update in lora.items():
        weight = weights[name]
        exact = update.apply_to(weight)
        change = exact - weight
        weight.copy_(exact)
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{name} with its LoRA has numbers that {weight.dtype} cannot hold: choose --dtype "
                "float32 or bfloat16"
            )
        lost += (weight - exact).square().sum().item()
        total += change.square().sum().item()
    return (lost / total) ** 0.5 if total else 0.0


def extract_lora(base: Family, tuned: Family, rank: int) -> tuple[Lora, float]:
    """What training added to the base, at `rank`, and the share of it that this leaves out.

    Raises: UserError where the two are not one model, or do not differ.
    """
    shapes = [adaptable_shapes(family) for family in (base, tuned)]
    different = [
        name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)
    ]
    if different:
        name = different[0]
        sizes = [list(shape[name]) if name in shape else "absent" for shape in shapes]
        raise UserError(
            f"{tuned.folder}: {len(different)} layers have other shapes than in {base.folder}, for "
            f"example {name}: {sizes[1]}, not {sizes[0]}. It was not trained from this base"
        )
    for family in (base, tuned):
        family.load(family.denoiser_name, *family.clip_encoders)
        for name, weight in loaded_weights(family).items():
            if not torch.isfinite(weight).all():
                raise UserError(f"{family.folder}: {name} has numbers that are NaN or infinite")
    lora, lost = lora_from_difference(loaded_weights(base), loaded_weights(tuned), rank)
    if not lora:
        raise UserError(
            f"{tuned.folder} has the same weights as {base.folder}: nothing was trained"
        )
    return lora, lost
