"""What a U-Net is for: how pixels become what is shown and what is wanted, the loss between them, and the picture."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import floats
from trainers.data.rng import Draws
from trainers.from_scratch.image_sets import Reader
from trainers.metrics.image_quality import psnr, sharpness, ssim


class Use(ABC):
    """Pixels are (B, C, H, W) uint8, the target's channels last; what is shown x and made y are in [-1, 1].

    target: how the second picture of a pair is read; masks: how many of its channels hold classes; noise: how many of
    the last channels of x are noise; inputs, outputs: channels of the network.
    """

    target: Reader | None = None
    masks = noise = 0

    def __init__(self, config: UNetConfig) -> None:
        self.config, self.objective = config, config.objective
        self.inputs = self.outputs = config.data.channels

    def show(self, pixels: Tensor) -> Tensor:
        """(B, inputs, H, W) of a picture without its target."""
        return floats(pixels)

    @abstractmethod
    def pair(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        """x and the wanted y."""

    @abstractmethod
    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """Of the network's output (B, outputs, H, W)."""

    def decide(self, prediction: Tensor) -> Tensor:
        """The network's output as a y."""
        return prediction

    @abstractmethod
    def render(self, x: Tensor, y: Tensor) -> Tensor:
        """A picture (B, 1 or 3, H, W) in [-1, 1]."""

    def figures(self, x: Tensor, made: Tensor, y: Tensor) -> dict[str, float]:
        """made, y: what was decided and what is wanted."""
        made, true = self.render(x, made), self.render(x, y)
        return {"psnr": psnr(made, true), "ssim": ssim(made, true), "sharpness": sharpness(made, true)}
