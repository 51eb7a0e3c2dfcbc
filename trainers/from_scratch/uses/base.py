"""What a U-Net is for: how pixels become what is shown and what is wanted, the loss between them,
and the picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import to_float
from trainers.data.rng import SampleRng
from trainers.from_scratch.image_sets import TargetReader
from trainers.metrics.image_quality import psnr, sharpness, ssim


class Use(ABC):
    """Pixels are (B, C, H, W) uint8, the target's channels last; what is shown x and made y are in
    [-1, 1].

    read_target: how the second picture of a pair is read; num_mask_channels: how many of its
    channels hold classes; num_noise_channels: how many of the last channels of x are noise; inputs,
    outputs: channels of the network.
    """

    read_target: TargetReader | None = None
    num_mask_channels = num_noise_channels = 0
    scale = 1  # how many times as large as what is given the result is

    def __init__(self, config: UNetConfig) -> None:
        self.config, self.objective = config, config.objective
        self.in_channels = self.out_channels = config.data.channels

    def to_input(self, pixels: Tensor) -> Tensor:
        """(B, inputs, H, W) of a picture without its target."""
        return to_float(pixels)

    @abstractmethod
    def pair(self, pixels: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """x and the wanted y."""

    @abstractmethod
    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Of the network's output (B, outputs, H, W)."""

    def postprocess(self, prediction: Tensor) -> Tensor:
        """The network's output as a y."""
        return prediction

    @abstractmethod
    def to_image(self, x: Tensor, y: Tensor) -> Tensor:
        """A picture (B, 1 or 3, H, W) in [-1, 1]."""

    def render(self, pixels: Tensor, x: Tensor, prediction: Tensor) -> Tensor:
        """The picture (B, 1 or 3, H, W) of `pixels` (B, C, H, W), which x was resized from."""
        height, width = pixels.shape[2:]
        image = self.to_image(x, self.postprocess(prediction))
        return resize(image, (self.scale * height, self.scale * width))

    def metrics(self, x: Tensor, generated: Tensor, y: Tensor) -> dict[str, float]:
        """generated, y: what was decided and what is wanted."""
        generated, true = self.to_image(x, generated), self.to_image(x, y)
        return {
            "psnr": psnr(generated, true),
            "ssim": ssim(generated, true),
            "sharpness": sharpness(generated, true),
        }

    def curves(self, figures: dict[str, float | str]) -> dict[str, float | str]:
        """Of these figures those to follow over the steps."""
        return figures


def resize(x: Tensor, size: Sequence[int], mode: str = "bicubic") -> Tensor:
    """(B, C, H, W) at another (height, width), smoothed where that is smaller."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode=mode, antialias=True)
