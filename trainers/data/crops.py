"""From a picture to the pixels that are trained on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from trainers.config import DataConfig
from trainers.data.buckets import Size, enlargement
from trainers.data.pictures import Picture
from trainers.data.rng import derive_seed

GEOMETRY = "geometry"  # in a batch: `Crop.geometry` of each sample, (B, 6) int64


@dataclass(frozen=True)
class Jitter:
    """A part of a crop, as large again as all of it, with other colors.

    share: of its sides; left and top: where the part is, as shares of the rest; brightness,
    contrast and saturation are factors, see Pillow's `ImageEnhance`.
    """

    share: float = 1.0
    left: float = 0.5
    top: float = 0.5
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def recolor(self, image: Image.Image) -> Image.Image:
        for kind, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            if factor != 1:
                image = kind(image).enhance(factor)
        return image


PLAIN = Jitter()


@dataclass(frozen=True)
class Crop:
    """One way to cut `width` x `height` pixels out of a picture; `left` and `top` are shares of the
    free margin, and `jitter` is what is done to the crop."""

    width: int
    height: int
    left: float = 0.5
    top: float = 0.5
    flip: bool = False
    jitter: Jitter = PLAIN

    @classmethod
    def square(cls, side: int) -> Crop:
        """The square in the middle."""
        return cls(side, side)

    def box(self, picture: Size) -> tuple[Size, tuple[int, int]]:
        """The size that a picture is resized to, and where in it the crop's left upper corner is.

        picture: its size. Nothing is distorted: it just covers the crop.
        """
        scale = enlargement(picture, (self.width, self.height)) / self.jitter.share
        width = max(self.width, round(picture[0] * scale))
        height = max(self.height, round(picture[1] * scale))
        jitter = self.jitter
        left = offset(width, self.width, jitter.share, self.left, jitter.left)
        top = offset(height, self.height, jitter.share, self.top, jitter.top)
        return (width, height), (left, top)

    def cut(
        self, image: Image.Image, resampling: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Image.Image:
        """The picture inside of the crop, in its own colors."""
        size, (left, top) = self.box(image.size)
        image = image.resize(size, resampling)
        image = image.crop((left, top, left + self.width, top + self.height))
        return ImageOps.mirror(image) if self.flip else image

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, height, width) in [-1, 1]."""
        pixels = np.array(self.jitter.recolor(self.cut(image)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1

    def geometry(self, picture: Size) -> tuple[int, ...]:
        """Six numbers in the order of SDXL's time ids (Podell et al. 2023, 2.2).

        Height and width of the picture, top and left of the crop in the resized one, height and
        width of the crop. A crop that is mirrored lies in the mirrored picture.
        """
        (width, _), (left, top) = self.box(picture)
        if self.flip:
            left = width - left - self.width
        return picture[1], picture[0], top, left, self.height, self.width


def offset(side: int, cut: int, share: float, place: float, inner_place: float) -> int:
    """Where a part of `cut` pixels begins in a side of the resized picture.

    share: of the part in a crop, which is at `place` in the side as the part is in the crop.
    """
    if share == 1:
        return round(place * (side - cut))
    crop = min(cut / share, side)
    return round(place * (side - crop) + inner_place * (crop - cut))


def choose_crop(picture: Picture, variant: int, size: Size, config: DataConfig) -> Crop:
    """Variant v of a picture: a random crop, flip and jitter that depend on the picture's content
    and v only."""
    if config.num_variants == 1:
        return Crop(*size)
    r = random.Random(derive_seed(picture.digest, variant))
    left, top, flip = r.random(), r.random(), r.random() < 0.5
    if config.center_crop:
        left = top = 0.5
    jitter = choose_jitter(r, config.crop_jitter, config.color_jitter)
    return Crop(*size, left, top, flip and config.random_flip, jitter)


def choose_jitter(r: random.Random, crop: float, color: float) -> Jitter:
    """Draws six numbers; without crop and color the jitter is none."""
    share, left, top = 1 - crop * r.random(), r.random(), r.random()
    if not crop:
        left = top = 0.5
    return Jitter(share, left, top, *(1 + color * r.uniform(-1, 1) for _ in range(3)))
