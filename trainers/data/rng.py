"""Random numbers that depend on (seed, step, row of the global batch) and on nothing else.

So one process with four accumulated micro-batches trains like four processes, and a resumed run
needs no random state (the idea is EDM2's: Karras et al. 2024, `training_loop.py`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """One well-spread 63-bit seed from several integers or names."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def manual_seed(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, on the host and `device` only; that one also writes down stack
    traces."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class SampleRng:
    """The random streams of one micro-batch: row i of every draw comes from the stream of global
    row `rows[i]`.

    global_batch_size: how many rows the global batch has; with several pools of pictures, each pool
    has as many, one after another.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        rows: Sequence[int],
        device: torch.device | str = "cpu",
        global_batch_size: int = 1,
    ) -> None:
        self.seed, self.step, self.rows = seed, step, rows
        self.device = torch.device(device)
        self.global_batch_size = global_batch_size

    @cached_property
    def generators(self) -> list[torch.Generator]:
        seeds = [derive_seed(self.seed, self.step, row) for row in self.rows]
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Unit Gaussian of `shape` (B, ...), float32."""
        shape = shape[1:]
        rows = [torch.randn(shape, generator=g, device=self.device) for g in self.generators]
        return torch.stack(rows)

    def uniform(self, stratified: bool = False) -> Tensor:
        """(B,) uniform in (0, 1), float32.

        stratified: each of `global_batch_size` equal parts has one row of each global pool.
        """
        draws = [torch.rand(1, generator=g, device=self.device) for g in self.generators]
        if stratified:
            # Python's numbers, for a tensor of them would make the host wait for the device
            for i, row in enumerate(self.rows):
                draws[i] = (draws[i] + self.stratum(row)) / self.global_batch_size
        return torch.cat(draws).clamp(2**-24, 1 - 2**-24)

    def stratum(self, row: int) -> int:
        """The number of the part that a row draws from."""
        pool, position = divmod(row, self.global_batch_size)
        seed = derive_seed(self.seed, self.step, pool, "strata")
        return permutation(seed, self.global_batch_size)[position]


# each bucket of pictures has one, of which there may be a hundred
@lru_cache(maxsize=256)
def permutation(seed: int, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def choose_among(seed: int, rows: Sequence[int], count: int) -> list[int]:
    """`count` of these rows by chance, in their order; all of them where there are no more."""
    return [rows[i] for i in choose_rows(seed, len(rows), count)]


def choose_rows(seed: int, num_rows: int, count: int) -> Sequence[int]:
    """`count` rows by chance, in ascending order; all of them where there are no more.

    What is measured on a part must not depend on the order of the rows: many data sets are sorted
    by class.
    """
    if count >= num_rows:
        return range(num_rows)
    return sorted(random.Random(seed).sample(range(num_rows), count))
