"""Instance and class pictures as weighted micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.config import DataConfig
from trainers.data.crops import view
from trainers.data.pictures import Picture
from trainers.data.rng import Draws, mix
from trainers.data.sampler import Share

if TYPE_CHECKING:
    from trainers.data.encoder_cache import CachedEncoder


@dataclass
class Batches:
    """The micro-batches of each step for one process, a pure function of (seed, step).

    A micro-batch has `share.batch_size` instance pictures and, with prior preservation (two pools), as many class
    pictures. Sample weights are 1/n for n instance pictures and
    prior_loss_weight/m for m class pictures: their weighted sum is the instance mean plus the weighted prior mean
    (Ruiz et al. 2023).
    """

    pools: Sequence[Sequence[Picture]]
    encoded: CachedEncoder
    config: DataConfig
    share: Share
    device: torch.device | str = "cpu"

    @property
    def weight(self) -> Tensor:
        """(B,)"""
        rows, weights = self.share.batch_size, [1.0, self.config.prior_loss_weight][: len(self.pools)]
        return torch.cat([torch.full((rows,), weight / rows, device=self.device) for weight in weights])

    def __call__(self, step: int) -> Iterator[tuple[dict, Draws]]:
        for visits in self.visits():
            of_all = [self.share.total * pool + row for pool, row in visits]
            yield self.collate(step, visits), Draws(self.share.seed, step, of_all, self.device, self.share.total)

    def visits(self) -> list[list[tuple[int, int]]]:
        """Pool and row of each sample of each micro-batch."""
        pools = range(len(self.pools))
        return [[(pool, row) for pool in pools for row in rows] for rows in self.share.micro_batches()]

    def names(self, step: int) -> list[list[str]]:
        """Of the pictures in each micro-batch."""
        return [[self.picture(step, pool, row).name for pool, row in visits] for visits in self.visits()]

    def picture(self, step: int, pool: int, row: int) -> Picture:
        return self.pools[pool][self.share.visited(step, row, len(self.pools[pool]), pool)]

    def collate(self, step: int, visits: list[tuple[int, int]]) -> dict:
        """Moments (B, 2C, h, w), text {name: (B, ...)} and weight (B,), on the device."""
        moments, texts = [], []
        for pool, row in visits:
            picture = self.picture(step, pool, row)
            key = self.share.seed, step, self.share.total * pool + row
            variant = mix(*key, "variant") % self.config.variants
            dropped = mix(*key, "caption") < self.config.caption_dropout * 2**63
            moments.append(self.encoded.moments(picture, view(picture, variant, self.config)))
            texts.append(self.encoded.text("" if dropped else picture.caption))
        text = {name: self.stacked([row[name] for row in texts]) for name in texts[0]}
        return {"moments": self.stacked(moments), "text": text, "weight": self.weight}

    def stacked(self, rows: list[Tensor]) -> Tensor:
        return torch.stack([row.to(self.device, non_blocking=True) for row in rows])
