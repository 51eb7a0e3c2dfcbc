"""How much of a LoRA's rank is used, LoRA of a lower rank, and LoRA from the difference of two
models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.lora.update import Lora, LoraUpdate

ENERGY_KEPT = 0.99  # of the energy, by the suggested rank


def svd(update: LoraUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """u (out, r), s (r,), v (r, in x kernel) of B A, in float64, from the thin factors: B A is
    never made."""
    q, r = torch.linalg.qr(update.b.flatten(1).double())
    p, t = torch.linalg.qr(update.a.flatten(1).double().T)
    u, s, v = torch.linalg.svd(r @ t.T, full_matrices=False)
    return q @ u, s, v @ p.T


def energy_by_rank(lora: Lora) -> list[float]:
    """Share of the squared Frobenius norm of all updates together that rank 1, 2, ... in every
    layer would keep.

    It is what the nearest updates of that rank hold (Eckart and Young 1936).
    """
    squares = [svd(update)[1].square() for update in lora.values()]
    max_rank = max(map(len, squares))
    energies = sum(F.pad(square, (0, max_rank - len(square))) for square in squares).cumsum(0)
    return (energies / energies[-1]).nan_to_num(1.0).tolist()


def smallest_rank(energies: Sequence[float], share_kept: float = ENERGY_KEPT) -> int:
    """The smallest rank that keeps the share `share_kept`."""
    return next(
        rank
        for rank, energy in enumerate(energies, 1)
        if energy >= share_kept or rank == len(energies)
    )


def reduce_rank(lora: Lora, rank: int) -> tuple[Lora, float]:
    """The nearest updates of at most `rank` (Eckart and Young 1936), and how far off they are.

    The distance is the Frobenius norm of all layers' differences, relative to that of all updates.
    """
    kernel_shapes = {
        name: (update.a.shape[1:], update.b.shape[2:]) for name, update in lora.items()
    }
    return truncate_factors(
        {name: (*svd(update), *kernel_shapes[name]) for name, update in lora.items()}, rank
    )


def lora_from_difference(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int
) -> tuple[Lora, float]:
    """What training added to the weights (out, in, ...) of layers, at `rank`; and what is lost, as
    `reduce_rank` tells."""
    factors = {}
    for name, weight in base.items():
        delta = tuned[name].float() - weight.float()
        if delta.any():
            u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            factors[name] = (u, s, v, delta.shape[1:], [1] * (delta.ndim - 2))
    return truncate_factors(factors, rank)


def truncate_factors(factors: Mapping[str, tuple], rank: int) -> tuple[Lora, float]:
    """factors: of each layer u (out, r), s (r,), v (r, in x kernel), and how a and b end beyond r
    and out, r."""
    lora, lost, total = {}, 0.0, 0.0
    for name, (u, s, v, a_end, b_end) in factors.items():
        root = s[:rank].sqrt()
        a, b = root[:, None] * v[:rank], u[:, :rank] * root
        lora[name] = LoraUpdate(
            a.float().reshape(len(root), *a_end), b.float().reshape(*b.shape, *b_end)
        )
        lost += s[rank:].square().sum().item()
        total += s.square().sum().item()
    return lora, (lost / total) ** 0.5 if total else 0.0
