"""Instance and class pictures as weighted micro-batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trainers.config import DataConfig, DreamBoothConfig
from trainers.data.buckets import Bucket
from trainers.data.caption_variants import draw_text
from trainers.data.crops import GEOMETRY, Crop, choose_crop
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng, derive_seed
from trainers.data.sampler import BatchSlice, choose_bucket
from trainers.data.transfer import send

if TYPE_CHECKING:
    from trainers.data.encoder_cache import CachedEncoder

HELD_OUT_DRAWS = 4  # draws of time and noise for each held-out picture


class Row(NamedTuple):
    """A sample of a global batch: a row of a pool of pictures; is_told: that row again, told a
    prompt whose output is to be kept instead of its caption."""

    pool: int
    row: int
    is_told: bool = False


@dataclass
class DreamBoothBatches:
    """The micro-batches of each step for one process, a pure function of (seed, step).

    A global batch is of one bucket, so that its pictures have one size. A micro-batch has
    `batch_slice.batch_size` instance pictures and, with prior preservation, as many class pictures
    (two pools) or the instance pictures again with prompts to keep (`kept_prompts`). Sample weights
    are 1/n for n instance pictures and prior_loss_weight/m for m others: their weighted sum is the
    instance mean plus the weighted prior mean (Ruiz et al. 2023).

    kept_prompts: by concept those that are told in turn; a row that is told one has the picture,
    the crop and the random draws, and so the noisy latents, of its instance row.
    """

    pools: Sequence[Sequence[Picture]]
    encoder: CachedEncoder
    config: DataConfig
    batch_slice: BatchSlice
    buckets: Sequence[Bucket]
    device: torch.device | str = "cpu"
    kept_prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = [len(bucket.pools[0]) for bucket in self.buckets]
        self.has_masks = any(picture.mask for pool in self.pools for picture in pool)

    @property
    def sample_weights(self) -> Tensor:
        """(B,)"""
        rows, weights = self.batch_slice.batch_size, [1.0]
        if self.kept_prompts or len(self.pools) > 1:
            weights.append(self.config.prior_loss_weight)
        return torch.cat(
            [torch.full((rows,), weight / rows, device=self.device) for weight in weights]
        )

    def __call__(self, step: int) -> Iterator[tuple[dict, SampleRng]]:
        for rows in self.micro_batch_rows():
            global_rows = [self.stream(row) for row in rows]
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

    def micro_batch_rows(self) -> list[list[Row]]:
        """The samples of each micro-batch; those that are told a prompt come last."""
        kinds = [(pool, False) for pool in range(len(self.pools))]
        if self.kept_prompts:
            kinds.append((0, True))
        return [
            [Row(pool, row, is_told) for pool, is_told in kinds for row in rows]
            for rows in self.batch_slice.micro_batches()
        ]

    def stream(self, row: Row) -> int:
        """The row of the global batch whose random draws a sample has."""
        return self.batch_slice.global_batch_size * row.pool + row.row

    def sample_names(self, step: int) -> list[list[str]]:
        """Of the pictures in each micro-batch."""
        return [
            [self.picture(step, row).name for row in rows if not row.is_told]
            for rows in self.micro_batch_rows()
        ]

    def heaviest_step(self, start: int) -> int:
        """The first step from `start` on with the largest pictures of the run."""
        largest = max(self.buckets, key=lambda bucket: bucket.num_pixels)
        step = start
        while self.bucket(step)[0] is not largest:
            step += 1
        return step

    def bucket(self, step: int) -> tuple[Bucket, int]:
        """The bucket of a step, and of how many steps before."""
        index, previous = choose_bucket(self.batch_slice.seed, step, self.counts)
        return self.buckets[index], previous

    def picture(self, step: int, row: Row) -> Picture:
        bucket, previous = self.bucket(step)
        pictures = bucket.pools[row.pool]
        index = self.batch_slice.sample_index(previous, row.row, len(pictures), row.pool)
        return pictures[index]

    def text(self, step: int, row: Row, picture: Picture) -> str:
        """The caption of a visit, or the prompt whose turn it is."""
        if row.is_told:
            prompts = self.kept_prompts[picture.concept]
            turn = step * self.batch_slice.global_batch_size + row.row
            return prompts[turn % len(prompts)]
        key = self.batch_slice.seed, step, self.stream(row)
        if derive_seed(*key, "caption") < self.config.caption_dropout * 2**63:
            return ""
        return draw_text(picture.captions, picture.wording, key)

    def collate(self, step: int, rows: list[Row]) -> dict:
        """Moments (B, 2C, h, w), text {name: (B, ...)}, weight (B,) and geometry (B, 6), see
        `Crop.geometry`, on the device; num_kept: how many rows at the end are told a prompt whose
        output is to be kept.

        A run with masks has the weight of each latent in mask (B, 1, h, w) too.
        """
        moments, texts, masks, geometry = [], [], [], []
        size = self.bucket(step)[0].size
        for row in rows:
            picture = self.picture(step, row)
            key = self.batch_slice.seed, step, self.stream(row)
            variant = derive_seed(*key, "variant") % self.config.num_variants
            crop = choose_crop(picture, variant, size, self.config)
            moments.append(self.encoder.moments(picture, crop))
            if self.has_masks:
                mask = self.encoder.mask(picture, crop, moments[-1].shape[-2:])
                # what the base knows is kept everywhere
                masks.append(torch.ones_like(mask) if row.is_told else mask)
            geometry.append(crop.geometry(picture.facts.size))
            texts.append(self.encoder.text_inputs(self.text(step, row, picture)))
        text = {name: self.stack_text([row[name] for row in texts]) for name in texts[0]}
        batch = {
            "moments": self.stack_on_device(moments),
            "text": text,
            "weight": self.sample_weights,
            GEOMETRY: send(torch.tensor(geometry), self.device),
            "num_kept": sum(row.is_told for row in rows),
        }
        if masks:
            # exact for 0 and 1, so that a white mask changes nothing
            shown = self.stack_on_device(masks)
            batch["mask"] = 1 - (1 - self.config.mask_floor) * (1 - shown)
        return batch

    def stack_on_device(self, rows: list[Tensor]) -> Tensor:
        return torch.stack([send(row, self.device) for row in rows])

    def stack_text(self, rows: list[Tensor]) -> Tensor:
        """On the device; numbers, one of each prompt, decide shapes and stay where they can be
        read without a wait."""
        return self.stack_on_device(rows) if rows[0].ndim else torch.stack(rows).cpu()

    def crops(self) -> Iterator[tuple[Picture, Crop]]:
        """Every view of every picture that a step may ask for."""
        for bucket in self.buckets:
            for picture in dict.fromkeys(picture for pool in bucket.pools for picture in pool):
                for variant in range(self.config.num_variants):
                    yield picture, choose_crop(picture, variant, bucket.size, self.config)


def passes(batch: dict, rng: SampleRng, x_t: Tensor, t: Tensor) -> Iterator[tuple[Hashable, tuple]]:
    """A key and the denoiser's inputs, x_t, t and text (B, ...) each: of the whole micro-batch
    and, if there are any, of its last rows alone, for which the base's output is kept."""
    key, text = (rng.step, rng.rows[0]), batch["text"] | {GEOMETRY: batch[GEOMETRY]}
    yield key, (x_t, t, text)
    if num_kept := batch["num_kept"]:
        last = {name: rows[-num_kept:] for name, rows in text.items()}
        yield (*key, "base"), (x_t[-num_kept:], t[-num_kept:], last)


def held_out_batches(
    buckets: Sequence[Bucket],
    encoder: CachedEncoder,
    config: DreamBoothConfig,
    device: torch.device | str,
) -> list[DreamBoothBatches]:
    """Micro-batches of one held-out picture each, for every process alike; no caption is dropped.

    Step 0 of each item has the pictures of one bucket, each several times, with other times and
    noise.
    """
    seed = derive_seed(config.seed, "held out")
    without_chance = {"caption_dropout": 0.0, "color_jitter": 0.0, "crop_jitter": 0.0}
    undropped = config.data.model_copy(update=without_chance)
    result = []
    for bucket in buckets:
        batch_slice = BatchSlice(seed, 1, HELD_OUT_DRAWS * len(bucket.pools[0]))
        settings = encoder, undropped, batch_slice, [bucket], device
        result.append(DreamBoothBatches(bucket.pools, *settings))
    return result
