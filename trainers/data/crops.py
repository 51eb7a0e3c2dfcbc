"""From a picture to the pixels that are trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainers.config import DataConfig
from trainers.data.buckets import Size, enlargement
from trainers.data.pictures import Picture
from trainers.data.rng import derive_seed


@dataclass(frozen=True)
class Crop:
    """One way to cut `width` x `height` pixels out of a picture; `left` and `top` are shares of the
    free margin."""

    width: int
    height: int
    left: float = 0.5
    top: float = 0.5
    flip: bool = False

    @classmethod
    def square(cls, side: int) -> Crop:
        """The square in the middle."""
        return cls(side, side)

    def box(self, picture: Size) -> tuple[Size, tuple[int, int]]:
        """The size that a picture is resized to, and where in it the crop's left upper corner is.

        picture: its size. Nothing is distorted: it just covers the crop.
        """
        scale = enlargement(picture, (self.width, self.height))
        width = max(self.width, round(picture[0] * scale))
        height = max(self.height, round(picture[1] * scale))
        left, top = (
            round(self.left * (width - self.width)),
            round(self.top * (height - self.height)),
        )
        return (width, height), (left, top)

    def cut(self, image: Image.Image) -> Image.Image:
        """The picture inside of the crop."""
        size, (left, top) = self.box(image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + self.width, top + self.height))
        return ImageOps.mirror(image) if self.flip else image

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, height, width) in [-1, 1]."""
        return torch.from_numpy(np.array(self.cut(image))).permute(2, 0, 1).float() / 127.5 - 1

    def geometry(self, picture: Size) -> tuple[int, ...]:
        """Six numbers in the order of SDXL's time ids (Podell et al. 2023, 2.2).

        Height and width of the picture, top and left of the crop in the resized one, height and
        width of the crop.
        """
        _, (left, top) = self.box(picture)
        return picture[1], picture[0], top, left, self.height, self.width


def choose_crop(picture: Picture, variant: int, size: Size, config: DataConfig) -> Crop:
    """Variant v of a picture: a random crop and flip that depend on the picture's content and v
    only."""
    if config.num_variants == 1:
        return Crop(*size)
    r = random.Random(derive_seed(picture.digest, variant))
    left, top, flip = r.random(), r.random(), r.random() < 0.5
    if config.center_crop:
        left = top = 0.5
    return Crop(*size, left, top, flip and config.random_flip)
