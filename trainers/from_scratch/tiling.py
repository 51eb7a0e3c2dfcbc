"""Large pictures in overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.data.imaging import mirror_pad


def predict_tiled(model: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    """`model` on x (B, C, H, W) of any size, in tiles of the size that it learnt from, blended
    where they overlap.

    Tiles overlap by half; edges are mirrored (Ronneberger et al. 2015, figure 2).
    """
    height, width = x.shape[2:]
    if (height, width) == (tile, tile):
        return model(x)
    x = mirror_pad(x, tile, tile)
    ramp = torch.arange(1, tile + 1, device=x.device)
    window = torch.minimum(ramp, ramp.flip(0)).float()
    window = window[:, None] * window  # (tile, tile), highest in the middle
    total, weight = None, torch.zeros(x.shape[2:], device=x.device)
    for top in tile_offsets(x.shape[2], tile):
        for left in tile_offsets(x.shape[3], tile):
            window_index = (..., slice(top, top + tile), slice(left, left + tile))
            out = model(x[window_index]) * window
            total = out.new_zeros(*out.shape[:2], *x.shape[2:]) if total is None else total
            total[window_index] += out
            weight[window_index] += window
    return (total / weight)[..., :height, :width]


def tile_offsets(length: int, tile: int) -> list[int]:
    """Where tiles begin: half a tile apart, the last one at the end."""
    return sorted({*range(0, length - tile, tile // 2), length - tile})
