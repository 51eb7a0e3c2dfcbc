"""The layers of a base model that LoRA can change: their names, and updates merged into them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextModel

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


def adaptable_layers(family: Family) -> Layers:
    """Every layer of the base that LoRA can be on, and its outputs; no weights are loaded."""
    parts = (family.denoiser_name, *family.clip_encoders)
    weights = adaptable_weights({part: family.meta_model(part) for part in parts})
    return {name: len(weight) for name, weight in weights.items()}


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

    Returns what rounding to the weights' precision loses, relative to the updates.
    """
    weights = loaded_weights(family)
    lost = total = 0.0
    for name, update in lora.items():
        weight = weights[name]
        product = update.delta_weight().view_as(weight)
        exact = weight.double() + product
        weight.copy_(exact)
        lost += (weight - exact).square().sum().item()
        total += product.double().square().sum().item()
    return (lost / total) ** 0.5


def extract_lora(base: Family, tuned: Family, rank: int) -> tuple[Lora, float]:
    """What training added to the base, at `rank`, and the share of it that this leaves out."""
    for family in (base, tuned):
        family.load(family.denoiser_name, *family.clip_encoders)
    return lora_from_difference(loaded_weights(base), loaded_weights(tuned), rank)
