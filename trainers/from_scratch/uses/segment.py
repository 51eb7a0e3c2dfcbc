"""A class for each pixel."""

from __future__ import annotations

import io

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import to_float
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.from_scratch.uses.base import Use
from trainers.metrics.image_quality import confusion_metrics

IGNORE_INDEX = 255  # in a mask


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
        """The mean over pictures of their means over known pixels, 0 for a picture without any.

        Pictures weigh alike, so that several small batches equal one large one.
        """
        known = y != IGNORE_INDEX
        truth = (
            F.one_hot(y.where(known, 0), self.out_channels).movedim(3, 1) * known[:, None]
        )  # (B, K, H, W)
        share = prediction.float().softmax(1) * known[:, None]
        dice = (2 * (share * truth).sum((2, 3)) + 1) / ((share + truth).sum((2, 3)) + 1)
        errors = F.cross_entropy(prediction, y, ignore_index=IGNORE_INDEX, reduction="none")
        entropy = errors.sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
        return entropy.mean() + self.objective.dice_weight * (1 - dice.mean())

    def postprocess(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)

    def to_image(self, x: Tensor, y: Tensor) -> Tensor:
        top = self.out_channels - 1
        return 2 * y[:, None].clamp(max=top) / top - 1

    def metrics(self, x: Tensor, generated: Tensor, y: Tensor) -> dict[str, float]:
        return confusion_metrics(generated, y, self.out_channels, IGNORE_INDEX)


def read_mask(picture: Picture, classes: int) -> Image.Image:
    """Classes as a picture of mode P, which is resized by the nearest pixel. Raises: UserError for
    other values."""
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            array = np.asarray(image)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserError(
            f"{picture.name} is not a readable mask ({error}): mend or remove it"
        ) from None
    channels = array.reshape(*array.shape[:2], -1)
    channels = channels[..., :1] if channels.shape[2] == 2 else channels[..., :3]  # without alpha
    if (channels != channels[..., :1]).any():
        raise UserError(
            f"{picture.name} is in colour: a mask has one channel, which holds the class of each "
            f"pixel"
        )
    array = channels[..., 0].astype(int)
    values = np.unique(array).tolist()
    if classes == 2 and set(values) <= {0, 255}:
        array = array // 255
    elif invalid := [
        v for v in values if not 0 <= v < classes and (v != IGNORE_INDEX or classes == 2)
    ]:
        found_values = ", ".join(map(str, invalid[:5])) + (", ..." if len(invalid) > 5 else "")
        allowed = (
            "0 and 1, or 0 and 255"
            if classes == 2
            else f"0 to {classes - 1}, and {IGNORE_INDEX} for 'ignore'"
        )
        raise UserError(
            f"{picture.name} has the values {found_values}: with objective.classes={classes} a "
            f"mask holds {allowed}. "
            "JPEG spoils masks: save them as PNG"
        )
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette([level for level in range(256) for _ in range(3)])
    return image
