"""A class for each pixel."""

from __future__ import annotations

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import to_float
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.from_scratch.masks import IGNORE_INDEX, read_mask
from trainers.from_scratch.uses.base import Use
from trainers.metrics.image_quality import confusion_metrics


class Segment(Use):
    """y (B, H, W): classes. Cross-entropy and soft Dice (Milletari et al. 2016), the mean over
    classes."""

    num_mask_channels = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.out_channels = config.objective.classes

    def read_target(self, picture: Picture) -> Image.Image:
        return read_mask(picture, self.out_channels)

    def pair(self, pixels: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        return to_float(pixels[:, :-1]), pixels[:, -1].long()

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        known = y != IGNORE_INDEX
        truth = (
            F.one_hot(y.where(known, 0), self.out_channels).movedim(3, 1) * known[:, None]
        )  # (B, K, H, W)
        share = prediction.float().softmax(1) * known[:, None]
        dice = (2 * (share * truth).sum((2, 3)) + 1) / ((share + truth).sum((2, 3)) + 1)
        entropy = F.cross_entropy(prediction, y, ignore_index=IGNORE_INDEX, reduction="none").mean()
        return entropy + self.objective.dice_weight * (1 - dice.mean())

    def postprocess(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)

    def to_image(self, x: Tensor, y: Tensor) -> Tensor:
        top = self.out_channels - 1
        return 2 * y[:, None].clamp(max=top) / top - 1

    def metrics(self, x: Tensor, generated: Tensor, y: Tensor) -> dict[str, float]:
        return confusion_metrics(generated, y, self.out_channels, IGNORE_INDEX)
