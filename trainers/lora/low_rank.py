"""How much of a LoRA's rank is used, and the nearest LoRA of a lower rank.

A LoRA from the difference of two models is the same problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.errors import UserError
from trainers.lora.lycoris import LycorisUpdate
from trainers.lora.svd import svd_of_product
from trainers.lora.update import Lora, LoraUpdate, is_dora

ENERGY_KEPT = 0.99  # the share of the energy that the suggested rank keeps


@dataclass(frozen=True)
class Factors:
    """The singular value decomposition of a layer's update, and the kernels of a and b."""

    u: Tensor  # (out, r)
    s: Tensor  # (r,), the largest first
    v: Tensor  # (r, in x kernel)
    a_shape: Sequence[int]  # of a, after r
    b_kernel: Sequence[int]  # of b, after (out, r)


def svd(update: LoraUpdate | LycorisUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """u (out, r), s (r,) and v (r, in x kernel) of the update, in float64."""
    if isinstance(update, LycorisUpdate):
        return update.svd()
    return svd_of_product(update.b.flatten(1).double(), update.a.flatten(1).double())


def energy_by_rank(lora: Lora) -> list[float]:
    """The share of the updates' energy that rank 1, 2, ... in every layer would keep.

    The energy is the squared Frobenius norm of all updates together. The share is that of the
    nearest updates of that rank (Eckart and Young 1936).
    """
    squares = [svd(update)[1].square() for update in lora.values()]
    max_rank = max(map(len, squares))
    energies = sum(F.pad(square, (0, max_rank - len(square))) for square in squares).cumsum(0)
    # updates that are all zero lose nothing at any rank
    return (energies / energies[-1]).nan_to_num(1.0).tolist()


def smallest_rank(energies: Sequence[float], share_kept: float = ENERGY_KEPT) -> int:
    """The smallest rank that keeps the share `share_kept` of the energy."""
    for rank, energy in enumerate(energies, 1):
        if energy >= share_kept:
            return rank
    return len(energies)


def reduce_rank(lora: Lora, rank: int | Mapping[str, int]) -> tuple[Lora, float]:
    """The nearest updates of at most `rank` (Eckart and Young 1936), and how far off they are.

    rank: of all layers, or of each by its name.
    The distance is the Frobenius norm of all layers' differences, relative to that of all updates.
    Raises: UserError for DoRA.
    """
    if is_dora(lora):
        raise UserError(
            "this is DoRA, whose rows are rescaled, so that its nearest rank is not that of B A. "
            "Write it with --format merged, then give that folder with --base MODEL --rank N"
        )
    factors = {}
    for name, update in lora.items():
        if isinstance(update, LycorisUpdate):
            kernels = update.shape[1:], [1] * (len(update.shape) - 2)
        else:
            kernels = update.a.shape[1:], update.b.shape[2:]
        factors[name] = Factors(*svd(update), *kernels)
    return truncate_factors(factors, rank)


def lora_from_difference(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int
) -> tuple[Lora, float]:
    """What training added to the layers' weights (out, in, ...), at `rank`.

    Also returns the distance from all that it added, as `reduce_rank` does.
    """
    factors = {}
    for name, weight in base.items():
        delta = tuned[name].float() - weight.float()
        if delta.any():
            u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            factors[name] = Factors(u, s, v, delta.shape[1:], [1] * (delta.ndim - 2))
    return truncate_factors(factors, rank)


def truncate_factors(
    factors: Mapping[str, Factors], ranks: int | Mapping[str, int]
) -> tuple[Lora, float]:
    """The updates of the largest singular values, and what the others are relative to all.

    The square root of each singular value goes into a, and the same into b.
    """
    lora = {}
    lost = total = 0.0
    for name, layer in factors.items():
        u, s, v = layer.u, layer.s, layer.v
        rank = ranks if isinstance(ranks, int) else ranks[name]
        root = s[:rank].sqrt()
        a = root[:, None] * v[:rank]
        b = u[:, :rank] * root
        a = a.float().reshape(len(root), *layer.a_shape)
        lora[name] = LoraUpdate(a, b.float().reshape(*b.shape, *layer.b_kernel))
        lost += s[rank:].square().sum().item()
        total += s.square().sum().item()
    return lora, (lost / total) ** 0.5 if total else 0.0
