"""Good patches in a feature space that was learnt, and how far other patches are from them.

PatchCore's idea (Roth et al. 2022, "Towards Total Recall in Industrial Anomaly Detection"), with
the encoder that the run has trained in place of one that was trained on ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.from_scratch.networks import ConvAutoencoder

STRIDE = 4  # pixels from one patch to the next
PATCH_SIDE = 8  # of the raw patch that stands beside the features, pixels
LEVEL = 2  # of the encoder: its second, which has a place for each 4 pixels
DIMENSIONS = 64  # at most, that patches are compared in
CHUNK = 4096  # patches that are compared with the bank at once


@torch.no_grad()
def patch_features(model: ConvAutoencoder, x: Tensor) -> list[Tensor]:
    """The blocks of features (B, n, n, F) of pictures (B, C, S, S), a patch for `STRIDE` pixels.

    Raw pixels beside what the encoder makes of about as many: what it has learnt to disregard must
    not pass for good.
    """
    level = encoder_level(model, x)
    n = -(-x.shape[-1] // STRIDE)
    blocks = raw_patches(x, n), F.adaptive_avg_pool2d(level, n)
    return [block.permute(0, 2, 3, 1) for block in blocks]


def encoder_level(model: ConvAutoencoder, x: Tensor) -> Tensor:
    """What comes out of the level `LEVEL`, or of the last one where there are fewer."""
    level, count = x, 0
    for layer in model.encoder:
        if isinstance(layer, nn.Flatten) or count == LEVEL:
            break
        x = layer(x)
        if isinstance(layer, nn.SiLU):
            level, count = x, count + 1
    return level


def raw_patches(x: Tensor, n: int) -> Tensor:
    """(B, C * PATCH_SIDE ** 2, n, n), in the order of the pixels, around the centers of n x n
    squares; mirrored at the edges."""
    before = (PATCH_SIDE - STRIDE) // 2
    after = (n - 1) * STRIDE + PATCH_SIDE - before - x.shape[-1]
    padded = F.pad(x, (before, after, before, after), mode="reflect")
    return F.unfold(padded, PATCH_SIDE, stride=STRIDE).unflatten(2, (n, n))


@dataclass(frozen=True)
class PatchMemory:
    """basis (F, D), shift (D,): from features to the space in which patches are compared; bank
    (M, D): the good patches there."""

    basis: Tensor
    shift: Tensor
    bank: Tensor

    @classmethod
    def build(cls, blocks: Sequence[Tensor], size: int) -> PatchMemory:
        """From blocks of features (N, F) of good patches, of which `size` are kept.

        Each block counts alike, however large its numbers are; of all of them the `DIMENSIONS`
        directions with most variance are compared.
        """
        scales = [block.var(0).sum().clamp(min=1e-12).sqrt() for block in blocks]
        features = torch.cat(
            [block / scale for block, scale in zip(blocks, scales, strict=True)], 1
        )
        mean = features.mean(0)
        centered = (features - mean).double()
        axes = torch.linalg.eigh(centered.T @ centered)[1].flip(1)[:, :DIMENSIONS].float()
        widths = [scale.expand(block.shape[1]) for block, scale in zip(blocks, scales, strict=True)]
        candidates = (features - mean) @ axes
        bank = candidates[farthest_points(candidates, size)]
        return cls(axes / torch.cat(widths)[:, None], mean @ axes, bank)

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis, "shift": self.shift, "bank": self.bank}

    def distances(self, blocks: Sequence[Tensor]) -> Tensor:
        """(B, n, n) of features (B, n, n, F), to the nearest good patch."""
        points = torch.cat(tuple(blocks), -1) @ self.basis - self.shift
        nearest = [torch.cdist(p, self.bank).amin(1) for p in points.flatten(0, -2).split(CHUNK)]
        return torch.cat(nearest).view(points.shape[:-1])


def farthest_points(points: Tensor, count: int) -> Tensor:
    """The rows of `count` points (N, D), or all: each is the one that is farthest from those before
    (Sener and Savarese 2018), so that none is far from all that are kept."""
    if count >= len(points):
        return torch.arange(len(points), device=points.device)
    norms = points.square().sum(1)
    chosen = torch.zeros(count, dtype=torch.long, device=points.device)
    distances = torch.full_like(norms, torch.inf)
    for i in range(1, count):
        last = chosen[i - 1]
        distances = torch.minimum(distances, norms - 2 * (points @ points[last]) + norms[last])
        chosen[i] = distances.argmax()
    return chosen
