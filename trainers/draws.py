"""Random numbers that depend on (seed, step, row of the global batch) and on nothing else.

So one process with four accumulated micro-batches trains like four processes, and a resumed run needs no random state
(the idea is EDM2's: Karras et al. 2024, `training_loop.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def mix(*parts: int | str) -> int:
    """One well-spread 63-bit seed from several integers or names."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Draws:
    """The random streams of one micro-batch: row i of every draw comes from the stream of global row `rows[i]`."""

    def __init__(self, seed: int, step: int, rows: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.streams = [torch.Generator(self.device).manual_seed(mix(seed, step, row)) for row in rows]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Unit Gaussian of `shape` (B, ...), float32."""
        return torch.stack([torch.randn(shape[1:], generator=g, device=self.device) for g in self.streams])

    def integers(self, high: int, n: int) -> Tensor:
        """(n,) integers, uniform in [0, high)."""
        assert n == len(self.streams), f"{n} integers for {len(self.streams)} rows"
        return torch.cat([torch.randint(high, (1,), generator=g, device=self.device) for g in self.streams])
