"""From a picture to a square of pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainers.config import DataConfig
from trainers.data.pictures import Picture
from trainers.data.rng import derive_seed


@dataclass(frozen=True)
class Crop:
    """One way to cut a square of `size` pixels out of a picture; `left` and `top` are shares of the
    free margin."""

    size: int
    left: float = 0.5
    top: float = 0.5
    flip: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, size, size) in [-1, 1]: the short side resized to `size`, then cropped."""
        return self.pixels(image) / 127.5 - 1

    def pixels(
        self, image: Image.Image, resampling: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Tensor:
        """(C, size, size) in 0..255, cut as `__call__` does."""
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), resampling)
        left, top = round(self.left * (width - self.size)), round(self.top * (height - self.size))
        image = image.crop((left, top, left + self.size, top + self.size))
        if self.flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).float()


def choose_crop(picture: Picture, variant: int, config: DataConfig) -> Crop:
    """Variant v of a picture: a random crop and flip that depend on the picture's content and v
    only."""
    if config.num_variants == 1:
        return Crop(config.resolution)
    r = random.Random(derive_seed(picture.digest, variant))
    left, top, flip = r.random(), r.random(), r.random() < 0.5
    if config.center_crop:
        left = top = 0.5
    return Crop(config.resolution, left, top, flip and config.random_flip)
