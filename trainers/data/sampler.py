"""Which samples each process sees at each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from accelerate import Accelerator

from trainers.config import TrainConfig
from trainers.data.rng import mix, permutation


@dataclass(frozen=True)
class Share:
    """One process's part of the global batches, each of `accumulation` x `world` micro-batches of `batch_size` rows."""

    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, seed: int, config: TrainConfig, accelerator: Accelerator) -> Share:
        rank, world = accelerator.process_index, accelerator.num_processes
        return cls(seed, config.train_batch_size, config.gradient_accumulation_steps, rank, world)

    def in_smaller_parts(self) -> Share:
        """The same global batches in smaller micro-batches: halves if that goes, of one row at the least."""
        factor = next((n for n in range(2, self.batch_size) if self.batch_size % n == 0), self.batch_size)
        return replace(self, batch_size=self.batch_size // factor, accumulation=self.accumulation * factor)

    @property
    def total(self) -> int:
        """Rows of a global batch."""
        return self.batch_size * self.accumulation * self.world

    def micro_batches(self) -> Iterator[range]:
        """The rows of each."""
        for micro in range(self.accumulation):
            first = (micro * self.world + self.rank) * self.batch_size
            yield range(first, first + self.batch_size)

    def visited(self, step: int, row: int, count: int, *pool: int) -> int:
        """Which of `count` samples that row has: an endless walk through them, shuffled anew in each epoch."""
        epoch, place = divmod(step * self.total + row, count)
        return permutation(mix(self.seed, *pool, epoch, "order"), count)[place]
