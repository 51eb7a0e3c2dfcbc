"""Pictures from other pictures, by a conditional GAN (Isola et al. 2017)."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import floats
from trainers.data.pictures import Picture
from trainers.data.rng import Draws
from trainers.from_scratch.uses.base import Use


class Pix2Pix(Use):
    """y (B, 3, H, W): the target. Absolute error; the adversary is the task's (Isola et al. 2017).

    Noise is what grain is made of.
    """

    noise = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.inputs, self.outputs = config.data.channels + self.noise, 3

    def target(self, picture: Picture) -> Image.Image:
        return picture.decode()

    def show(self, pixels: Tensor) -> Tensor:
        return self.grained(pixels, Draws(self.config.seed, -1, range(len(pixels)), pixels.device))

    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        return self.grained(pixels[:, :-3], rng), floats(pixels[:, -3:])

    def grained(self, pixels: Tensor, rng: Draws) -> Tensor:
        return torch.cat([floats(pixels), rng.normal(pixels[:, :1].shape)], 1)

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).abs().mean()

    def render(self, x: Tensor, y: Tensor) -> Tensor:
        return y.clamp(-1, 1)
