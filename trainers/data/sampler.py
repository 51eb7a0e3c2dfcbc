"""Which samples each process sees at each step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from accelerate import Accelerator

from trainers.config import TrainConfig
from trainers.data.rng import derive_seed, permutation


@dataclass(frozen=True)
class BatchSlice:
    """One process's part of the global batches, each of `accumulation_steps` x `world_size`
    micro-batches of `batch_size` rows."""

    seed: int
    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_config(cls, seed: int, config: TrainConfig, accelerator: Accelerator) -> BatchSlice:
        rank, world_size = accelerator.process_index, accelerator.num_processes
        return cls(
            seed, config.train_batch_size, config.gradient_accumulation_steps, rank, world_size
        )

    def split_micro_batches(self) -> BatchSlice:
        """The same global batches in smaller micro-batches: halves if that goes, of one row at the
        least."""
        factor = next(
            (n for n in range(2, self.batch_size) if self.batch_size % n == 0), self.batch_size
        )
        return replace(
            self,
            batch_size=self.batch_size // factor,
            accumulation_steps=self.accumulation_steps * factor,
        )

    @property
    def global_batch_size(self) -> int:
        """Rows of a global batch."""
        return self.batch_size * self.accumulation_steps * self.world_size

    def micro_batches(self) -> Iterator[range]:
        """The rows of each."""
        for micro_batch in range(self.accumulation_steps):
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            yield range(first, first + self.batch_size)

    def sample_index(self, step: int, row: int, num_samples: int, *pool: int) -> int:
        """Which of `num_samples` samples that row has: an endless walk through them, shuffled anew
        in each epoch."""
        epoch, position = divmod(step * self.global_batch_size + row, num_samples)
        return permutation(derive_seed(self.seed, *pool, epoch, "order"), num_samples)[position]


def choose_bucket(seed: int, step: int, counts: Sequence[int]) -> tuple[int, int]:
    """Which bucket the global batch of a step is of, and of how many steps before.

    counts: the samples in each. Every `sum(counts)` steps, each bucket has had as many as it has
    samples, or the same in smaller numbers.
    """
    divisor = math.gcd(*counts)
    turns = tuple(count // divisor for count in counts)
    cycle, position = divmod(step, sum(turns))
    bucket, previous = bucket_order(seed, cycle, turns)[position]
    return bucket, cycle * turns[bucket] + previous


@lru_cache(maxsize=4)
def bucket_order(seed: int, cycle: int, turns: tuple[int, ...]) -> list[tuple[int, int]]:
    """The bucket of each step of a cycle, and how often it had its turn before in the cycle."""
    buckets = [bucket for bucket, number in enumerate(turns) for _ in range(number)]
    seen: Counter[int] = Counter()
    order = []
    for index in permutation(derive_seed(seed, cycle, "buckets"), len(buckets)):
        bucket = buckets[index]
        order.append((bucket, seen[bucket]))
        seen[bucket] += 1
    return order
