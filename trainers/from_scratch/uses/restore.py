"""Pictures without their noise, blur or holes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trainers.data.imaging import to_float
from trainers.data.rng import SampleRng
from trainers.from_scratch.uses.base import Use
from trainers.metrics.image_quality import psnr


class Restore(Use):
    """y (B, C, H, W): what is added to a noisy or enlarged picture; its squared error (Zhang et al.
    2017, DnCNN)."""

    @property
    def scale(self) -> int:
        return self.objective.downscale

    def to_input(self, pixels: Tensor) -> Tensor:
        """Noisy pictures as they are; small ones enlarged."""
        x, scale = to_float(pixels), self.objective.downscale
        return F.interpolate(x, scale_factor=scale, mode="bicubic").clamp(-1, 1) if scale > 1 else x

    def pair(self, pixels: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        true, scale = to_float(pixels), self.objective.downscale
        x = true
        if scale > 1:
            x = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
            x = F.interpolate(x, true.shape[2:], mode="bicubic")
        x = (x + 2 * self.objective.noise * rng.normal(x.shape)).clamp(-1, 1)
        return x, true - x

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction - y).square().mean()

    def to_image(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).clamp(-1, 1)

    def metrics(self, x: Tensor, generated: Tensor, y: Tensor) -> dict[str, float]:
        return super().metrics(x, generated, y) | {"psnr_shown": psnr(x, self.to_image(x, y))}
