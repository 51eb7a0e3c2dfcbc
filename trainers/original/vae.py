"""The names of an autoencoder's layers in its first release (Rombach et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Iterable

IN_RESNET = {"conv_shortcut": "nin_shortcut"}

IN_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
# linear layers here, 1 x 1 convolutions there
CONVOLUTIONS = ("q", "k", "v", "proj_out")

# diffusers' names as regexes, and the release's with what the groups found
PLACES = {
    r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)": "encoder.down.{}.block.{}.{}",
    r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv": "encoder.down.{}.downsample.conv",
    r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)": "decoder.up.{}.block.{}.{}",
    r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv": "decoder.up.{}.upsample.conv",
    r"(\w+)\.mid_block\.resnets\.(\d+)\.(\w+)": "{}.mid.block_{}.{}",
    r"(\w+)\.mid_block\.attentions\.0\.(.+)": "{}.mid.attn_1.{}",
    r"(\w+)\.conv_norm_out": "{}.norm_out",
}


def released_names(layers: Iterable[str]) -> dict[str, str]:
    """The release's name of each layer of an autoencoder, and diffusers'."""
    layers = list(layers)
    found = (re.match(r"decoder\.up_blocks\.(\d+)\.", layer) for layer in layers)
    last = max((int(match[1]) for match in found if match), default=0)
    return {rename(layer, last): layer for layer in layers}


def rename(layer: str, last: int) -> str:
    """last: the number of the decoder's last block, since its blocks are numbered backwards."""
    for pattern, released in PLACES.items():
        match = re.fullmatch(pattern, layer)
        if not match:
            continue
        parts = list(match.groups())
        if ".up_blocks." in layer:
            parts[0] = str(last - int(parts[0]))
        elif ".mid_block.resnets." in layer:
            parts[1] = str(int(parts[1]) + 1)
        inner = IN_ATTENTION if "attentions" in layer else IN_RESNET
        parts[-1] = inner.get(parts[-1], parts[-1])
        return released.format(*parts)
    return layer
