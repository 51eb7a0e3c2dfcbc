"""Good patches in a feature space that was learnt, and how far other patches are from them.

PatchCore's idea (Roth et al. 2022, "Towards Total Recall in Industrial Anomaly Detection"), with
the encoder that the run has trained in place of one that was trained on ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.from_scratch.networks import ConvAutoencoder

STRIDE = 4  # pixels from one patch to the next
PATCH_SIDE = 8  # of the raw patch that stands beside the features, pixels
LEVEL = 2  # of the encoder: its second, which has a place for each 4 pixels
DIMENSIONS = 64  # at most, that patches are compared in
CHUNK = 4096  # patches that are compared with a bank at once


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
class PatchBank:
    """Good patches in one block of features.

    basis (F, D), shift (D,): from features to the directions in which good patches vary; bank
    (M, D): good patches there; scale (): the distance between them that is usual.
    """

    basis: Tensor
    shift: Tensor
    bank: Tensor
    scale: Tensor

    @classmethod
    def build(cls, features: Tensor, size: int) -> PatchBank:
        """From features (N, F) of good patches, of which `size` are kept, and the `DIMENSIONS`
        directions in which they vary most."""
        mean = features.mean(0)
        centered = features - mean
        covariance = (centered.T @ centered).cpu().double()
        basis = torch.linalg.eigh(covariance)[1].flip(1)[:, :DIMENSIONS].to(features)
        points = centered @ basis
        bank = points[farthest_points(points, size)]
        some = points[:: -(-len(points) // CHUNK)]
        # the nearest one may be the patch itself
        others = torch.cdist(some, bank).topk(min(2, len(bank)), largest=False).values[:, -1]
        return cls(basis, mean @ basis, bank, others.mean().clamp(min=1e-6))

    def distances(self, features: Tensor) -> Tensor:
        """(...) of features (..., F): to the nearest good patch, in units of what is usual."""
        points = features @ self.basis - self.shift
        parts = points.flatten(0, -2).split(CHUNK)
        nearest = torch.cat([torch.cdist(part, self.bank).amin(1) for part in parts])
        return nearest.view(points.shape[:-1]) / self.scale


@dataclass(frozen=True)
class PatchMemory:
    """A bank for each block of `patch_features`, each with patches of its own: what is far from all
    good ones in one block is not made up for by the other."""

    banks: Sequence[PatchBank]

    @classmethod
    def build(cls, blocks: Sequence[Tensor], size: int) -> PatchMemory:
        """From blocks (N, F) of the same good patches."""
        return cls([PatchBank.build(block, size) for block in blocks])

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PatchMemory:
        """The inverse of `tensors`; others are passed over."""
        names = [part.name for part in fields(PatchBank)]
        count = sum(name.endswith(".bank") for name in tensors)
        return cls([PatchBank(*(tensors[f"{i}.{n}"] for n in names)) for i in range(count)])

    def tensors(self) -> dict[str, Tensor]:
        """By names such as 0.bank."""
        named = {}
        for i, bank in enumerate(self.banks):
            named |= {f"{i}.{part.name}": getattr(bank, part.name) for part in fields(bank)}
        return named

    def distances(self, blocks: Sequence[Tensor]) -> Tensor:
        """(B, n, n) of blocks (B, n, n, F): the mean over the blocks."""
        both = zip(self.banks, blocks, strict=True)
        return torch.stack([bank.distances(block) for bank, block in both]).mean(0)


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
