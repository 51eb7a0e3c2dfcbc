"""The names of a U-Net's layers in Stable Diffusion's first release.

There the blocks of all resolutions are numbered through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}

IN_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def released_names(layers: Iterable[str]) -> dict[str, str]:
    """The release's name of each layer of a U-Net, and diffusers'."""
    layers = list(layers)
    per_block = {"down": count_resnets(layers, "down"), "up": count_resnets(layers, "up")}
    names = {}
    for layer in layers:
        released = rename_outer(layer) or rename_in_block(layer, layers, per_block)
        if released:
            names[released] = layer
    return names


def count_resnets(layers: Iterable[str], side: str) -> int:
    matches = [re.match(rf"{side}_blocks\.0\.resnets\.(\d+)\.", layer) for layer in layers]
    return max((int(found[1]) + 1 for found in matches if found), default=0)


def rename_outer(layer: str) -> str:
    """The name of a layer that is in no numbered block; empty for another."""
    for own, released in OUTER.items():
        if layer == own or (own.endswith(".") and layer.startswith(own)):
            inner = layer.removeprefix(own)
            return released + IN_RESNET.get(inner, inner)
    return ""


def rename_in_block(layer: str, layers: list[str], per_block: dict[str, int]) -> str:
    """The name of a layer in a block that is numbered through; empty for another."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+?)s\.(\d+)\.(.*)", layer)
    if not found:
        return ""
    side, block, kind, number, inner = found.groups()
    inner = IN_RESNET.get(inner, inner)
    start = int(block) * (per_block["down"] + 1 if side == "down" else per_block["up"])
    if side == "down":
        # the first one is conv_in
        index = start + (per_block["down"] if kind == "downsampler" else int(number)) + 1
        return {
            "resnet": f"input_blocks.{index}.0.{inner}",
            "attention": f"input_blocks.{index}.1.{inner}",
            "downsampler": f"input_blocks.{index}.0.op",
        }.get(kind, "")
    index = start + (per_block["up"] - 1 if kind == "upsampler" else int(number))
    has_attention = any(name.startswith(f"up_blocks.{block}.attentions.") for name in layers)
    return {
        "resnet": f"output_blocks.{index}.0.{inner}",
        "attention": f"output_blocks.{index}.1.{inner}",
        "upsampler": f"output_blocks.{index}.{2 if has_attention else 1}.conv",
    }.get(kind, "")
