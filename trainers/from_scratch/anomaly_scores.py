"""How strange pictures, and the places in them, are to an autoencoder that has learnt good ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.config import AutoencoderConfig
from trainers.data.imaging import to_float
from trainers.data.rng import SampleRng, choose_rows, derive_seed
from trainers.from_scratch.codes import corrupt
from trainers.from_scratch.image_sets import ImageSet
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.patch_memory import PatchMemory, patch_features

NUM_MASKINGS = 8  # hidings that the reconstruction's score is the mean of
PIXELS_AT_ONCE = 2**20  # of the pictures that are scored at once, for their patches take memory
CANDIDATES = 10  # patches that are looked at for one that is kept
MAX_BANK_PICTURES = 2000  # that those come from


def count_at_once(side: int) -> int:
    """How many pictures of side x side pixels are scored at once."""
    return max(1, PIXELS_AT_ONCE // side**2)


class Scorer(ABC):
    """Says of each place in pictures (B, C, S, S) in [-1, 1] how strange it is."""

    name: str
    top_share: float  # of the places of a picture: the strangest, whose mean is its score

    @abstractmethod
    def batch_maps(self, x: Tensor) -> Tensor:
        """(B, S, S), higher where something is strange."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is kept of it beside the model."""

    @torch.no_grad()
    def maps(self, x: Tensor) -> Tensor:
        """As `batch_maps`, of any number of pictures."""
        if not len(x):
            return x[:, 0]
        return torch.cat([self.batch_maps(part) for part in x.split(count_at_once(x.shape[-1]))])

    def scores(self, maps: Tensor) -> Tensor:
        """(B,) of the pictures that have these maps."""
        places = maps.flatten(1)
        count = max(1, round(self.top_share * places.shape[1]))
        return places.topk(count).values.mean(1)


class ReconstructionScorer(Scorer):
    """How badly hidden patches are guessed (Zavrtanik et al. 2021, RIAD): the squared error of the
    mean guess, over all places.

    Errors are averaged over 3 x 3 pixels first: by how much a stroke's edge is off is no anomaly.
    """

    name, top_share = "reconstruction", 1.0

    def __init__(self, model: ConvAutoencoder, config: AutoencoderConfig) -> None:
        self.model, self.config = model, config

    def batch_maps(self, x: Tensor) -> Tensor:
        guess = torch.zeros_like(x)
        for k in range(NUM_MASKINGS):
            rng = SampleRng(self.config.seed, -2 - k, [0] * len(x), x.device)
            guess += self.model(corrupt(x, self.config, rng))[0].clamp(-1, 1)
        error = guess / NUM_MASKINGS - x
        return (F.avg_pool2d(error, 3, 1, 1) / 2).square().mean(1)

    def tensors(self) -> dict[str, Tensor]:
        return {}


class PatchScorer(Scorer):
    """How far the features of each patch are from the nearest of good pictures."""

    name, top_share = "patches", 0.03

    def __init__(self, model: ConvAutoencoder, memory: PatchMemory) -> None:
        self.model, self.memory = model, memory

    @classmethod
    @torch.no_grad()
    def build(
        cls, model: ConvAutoencoder, images: ImageSet, config: AutoencoderConfig
    ) -> PatchScorer:
        """With patches of the good pictures that `model` was trained on, a function of the weights,
        the pictures and the seed."""
        size, parts = config.validation.bank_size, []
        rows = choose_rows(derive_seed(config.seed, "bank"), len(images), MAX_BANK_PICTURES)
        per_picture = -(-CANDIDATES * size // len(rows))
        at_once = count_at_once(config.data.resolution)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            blocks = patch_features(model, to_float(images.take(part)))
            places = blocks[0][..., 0].flatten(1).shape[1]
            chosen = [
                i * places + place
                for i, row in enumerate(part)
                for place in choose_rows(derive_seed(config.seed, "bank", row), places, per_picture)
            ]
            kept = torch.tensor(chosen, device=model.device)
            parts.append([block.flatten(0, 2)[kept] for block in blocks])
        blocks = [torch.cat(same) for same in zip(*parts, strict=True)]
        return cls(model, PatchMemory.build(blocks, size))

    def batch_maps(self, x: Tensor) -> Tensor:
        distances = self.memory.distances(patch_features(self.model, x))
        return F.interpolate(distances[:, None], x.shape[-2:], mode="bilinear")[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        return self.memory.tensors()
