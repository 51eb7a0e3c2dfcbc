"""How much of a LoRA's rank is used: the singular values of its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP = 0.99  # of the energy, by the suggested rank


def lora_pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer, from a LoRA file of diffusers whose scale is one."""
    downs = {name: name.replace(".lora_A.", ".lora_B.") for name in state if ".lora_A." in name}
    return {a.partition(".lora_A.")[0]: (state[a], state[b]) for a, b in downs.items()}


def singular_values(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Of each layer's update B A, the largest first, from A (r, in, ...) and B (out, r, ...).

    With B = Q_b R_b and A' = Q_a R_a, they are those of R_b R_a', r by r: the update itself is never formed.
    """
    values = {}
    for name, (a, b) in pairs.items():
        r_a, r_b = (torch.linalg.qr(m.double(), mode="r").R for m in (a.flatten(1).mT, b.flatten(1)))
        values[name] = torch.linalg.svdvals(r_b @ r_a.mT)
    return values


def energy(values: Mapping[str, Tensor]) -> list[float]:
    """Share of the squared Frobenius norm of all updates together that rank 1, 2, ... in every layer would keep.

    It is what the nearest updates of that rank hold (Eckart and Young 1936).
    """
    top = max(len(v) for v in values.values())
    kept = sum(F.pad(v.square(), (0, top - len(v))) for v in values.values()).cumsum(0)
    return (kept / kept[-1]).nan_to_num(1.0).tolist()


def smallest_rank(energy: Sequence[float], keep: float = KEEP) -> int:
    """The smallest rank that keeps the share `keep`."""
    return next(rank for rank, share in enumerate(energy, 1) if share >= keep or rank == len(energy))
