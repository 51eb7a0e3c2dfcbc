"""Pictures from other pictures, by a conditional GAN (Isola et al. 2017)."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import to_float
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.from_scratch.uses.base import Use


class Pix2Pix(Use):
    """y (B, 3, H, W): the target. Absolute error; the adversary is the task's (Isola et al. 2017).

    Noise is what grain is made of.
    """

    num_noise_channels = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.in_channels, self.out_channels = config.data.channels + self.num_noise_channels, 3

    def read_target(self, picture: Picture) -> Image.Image:
        return picture.decode()

    def to_input(self, pixels: Tensor) -> Tensor:
        return self.add_noise_channel(
            pixels, SampleRng(self.config.seed, -1, range(len(pixels)), pixels.device)
        )

    def pair(self, pixels: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        return self.add_noise_channel(pixels[:, :-3], rng), to_float(pixels[:, -3:])

    def add_noise_channel(self, pixels: Tensor, rng: SampleRng) -> Tensor:
        return torch.cat([to_float(pixels), rng.normal(pixels[:, :1].shape)], 1)

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).abs().mean()

    def to_image(self, x: Tensor, y: Tensor) -> Tensor:
        return y.clamp(-1, 1)
