"""LoRA of a lower rank, and LoRA from the difference of two models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .formats import Lora, Update


def shrink(lora: Lora, rank: int) -> tuple[Lora, float]:
    """The nearest updates of at most `rank` (Eckart and Young 1936), and how far off they are.

    The distance is the Frobenius norm of all layers' differences, relative to that of all updates.
    """
    factors = {}
    for name, update in lora.items():  # from the thin factors: the whole product is never made
        q, r = torch.linalg.qr(update.b.flatten(1).double())
        p, t = torch.linalg.qr(update.a.flatten(1).double().T)
        u, s, v = torch.linalg.svd(r @ t.T)
        factors[name] = (q @ u, s, v @ p.T, update.a.shape[1:], update.b.shape[2:])
    return nearest(factors, rank)


def difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int) -> tuple[Lora, float]:
    """What training added to the weights (out, in, ...) of layers, at `rank`; and what is lost, as `shrink` tells."""
    factors = {}
    for name, weight in base.items():
        delta = tuned[name].float() - weight.float()
        if delta.any():
            u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
            factors[name] = (u, s, v, delta.shape[1:], [1] * (delta.ndim - 2))
    return nearest(factors, rank)


def nearest(factors: Mapping[str, tuple], rank: int) -> tuple[Lora, float]:
    """factors: of each layer u (out, r), s (r,), v (r, in x kernel), and how a and b end beyond r and out, r."""
    lora, lost, whole = {}, 0.0, 0.0
    for name, (u, s, v, a_end, b_end) in factors.items():
        root = s[:rank].sqrt()
        a, b = root[:, None] * v[:rank], u[:, :rank] * root
        lora[name] = Update(a.float().reshape(len(root), *a_end), b.float().reshape(*b.shape, *b_end))
        lost += s[rank:].square().sum().item()
        whole += s.square().sum().item()
    return lora, (lost / whole) ** 0.5 if whole else 0.0
