"""Singular values of a product, from its thin factors."""

from __future__ import annotations

import torch
from torch import Tensor


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (out, r), s (r,), the largest first, and v (r, in) of b (out, r) and a (r, in).

    The product, which is much larger, is never made.
    """
    q, r = torch.linalg.qr(b)
    p, t = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r @ t.T, full_matrices=False)
    return q @ u, s, v @ p.T
