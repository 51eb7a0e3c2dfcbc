"""Instance and class pictures as weighted micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.config import DataConfig, DreamBoothConfig
from trainers.data.caption_variants import draw_text
from trainers.data.crops import choose_crop
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng, derive_seed
from trainers.data.sampler import BatchSlice

if TYPE_CHECKING:
    from trainers.data.encoder_cache import CachedEncoder

HELD_OUT_DRAWS = 4  # draws of time and noise for each held-out picture


@dataclass
class DreamBoothBatches:
    """The micro-batches of each step for one process, a pure function of (seed, step).

    A micro-batch has `batch_slice.batch_size` instance pictures and, with prior preservation (two
    pools), as many class pictures. Sample weights are 1/n for n instance pictures and
    prior_loss_weight/m for m class pictures: their weighted sum is the instance mean plus the
    weighted prior mean (Ruiz et al. 2023).
    """

    pools: Sequence[Sequence[Picture]]
    encoder: CachedEncoder
    config: DataConfig
    batch_slice: BatchSlice
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        # each pool with every picture as often as it counts
        self.drawn_from = [repeat_pictures(pool) for pool in self.pools]

    @property
    def sample_weights(self) -> Tensor:
        """(B,)"""
        rows, weights = (
            self.batch_slice.batch_size,
            [1.0, self.config.prior_loss_weight][: len(self.pools)],
        )
        return torch.cat(
            [torch.full((rows,), weight / rows, device=self.device) for weight in weights]
        )

    def __call__(self, step: int) -> Iterator[tuple[dict, SampleRng]]:
        for rows in self.micro_batch_rows():
            global_rows = [self.batch_slice.global_batch_size * pool + row for pool, row in rows]
            yield (
                self.collate(step, rows),
                SampleRng(
                    self.batch_slice.seed,
                    step,
                    global_rows,
                    self.device,
                    self.batch_slice.global_batch_size,
                ),
            )

    def split_micro_batches(self) -> None:
        """From now on take more and smaller micro-batches for each step."""
        self.batch_slice = self.batch_slice.split_micro_batches()

    def micro_batch_rows(self) -> list[list[tuple[int, int]]]:
        """Pool and row of each sample of each micro-batch."""
        pools = range(len(self.pools))
        return [
            [(pool, row) for pool in pools for row in rows]
            for rows in self.batch_slice.micro_batches()
        ]

    def sample_names(self, step: int) -> list[list[str]]:
        """Of the pictures in each micro-batch."""
        return [
            [self.picture(step, pool, row).name for pool, row in rows]
            for rows in self.micro_batch_rows()
        ]

    def picture(self, step: int, pool: int, row: int) -> Picture:
        pictures = self.drawn_from[pool]
        return pictures[self.batch_slice.sample_index(step, row, len(pictures), pool)]

    def collate(self, step: int, rows: list[tuple[int, int]]) -> dict:
        """Moments (B, 2C, h, w), text {name: (B, ...)} and weight (B,), on the device."""
        moments, texts = [], []
        for pool, row in rows:
            picture = self.picture(step, pool, row)
            key = self.batch_slice.seed, step, self.batch_slice.global_batch_size * pool + row
            variant = derive_seed(*key, "variant") % self.config.num_variants
            is_dropped = derive_seed(*key, "caption") < self.config.caption_dropout * 2**63
            moments.append(
                self.encoder.moments(picture, choose_crop(picture, variant, self.config))
            )
            text = "" if is_dropped else draw_text(picture.captions, picture.wording, key)
            texts.append(self.encoder.text_inputs(text))
        text = {name: self.stack_on_device([row[name] for row in texts]) for name in texts[0]}
        return {
            "moments": self.stack_on_device(moments),
            "text": text,
            "weight": self.sample_weights,
        }

    def stack_on_device(self, rows: list[Tensor]) -> Tensor:
        return torch.stack([row.to(self.device, non_blocking=True) for row in rows])


def repeat_pictures(pictures: Sequence[Picture]) -> list[Picture]:
    """Every picture as often as it counts; only the ratios of the counts matter."""
    divisor = math.gcd(*(picture.repeats for picture in pictures))
    repeated = []
    for picture in pictures:
        repeated += [picture] * (picture.repeats // divisor)
    return repeated


def held_out_batches(
    pictures: Sequence[Picture],
    encoder: CachedEncoder,
    config: DreamBoothConfig,
    device: torch.device | str,
) -> DreamBoothBatches | None:
    """Micro-batches of one held-out picture each, for every process alike; no caption is dropped.

    None without pictures. Their step 0 has each picture several times, with other times and noise.
    """
    if not pictures:
        return None
    seed = derive_seed(config.seed, "held out")
    batch_slice = BatchSlice(seed, 1, HELD_OUT_DRAWS * len(pictures))
    undropped = config.data.model_copy(update={"caption_dropout": 0.0})
    return DreamBoothBatches([pictures], encoder, undropped, batch_slice, device)
