"""A class for each pixel."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from statistics import fmean

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trainers.config import UNetConfig
from trainers.data.imaging import to_float
from trainers.data.pictures import Picture
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.from_scratch.masks import (
    IGNORE_INDEX,
    MAX_NAMED_VALUES,
    check_values,
    find_values,
    is_binary,
    read_mask,
)
from trainers.from_scratch.uses.base import Use
from trainers.metrics.image_quality import confusion_metrics

NUM_READERS = 4  # threads


class Segment(Use):
    """y (B, H, W): classes. Cross-entropy and soft Dice (Milletari et al. 2016), the mean over
    classes."""

    num_mask_channels = 1

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.out_channels = config.objective.classes
        self.mask_values: frozenset[int] | None = None  # of all masks, once they were looked at

    def prepare(self, train: Sequence[Picture], test: Sequence[Picture]) -> None:
        """Look at all masks: what 255 stands for is seen in all of them, not in one.

        Raises: UserError for a mask that cannot be read and for masks that teach nothing.
        """
        with ThreadPoolExecutor(NUM_READERS) as pool:
            values = list(pool.map(find_values, [*train, *test], repeat(self.out_channels)))
        train_values = frozenset().union(*values[: len(train)])
        test_values = frozenset().union(*values[len(train) :])
        self.mask_values = train_values | test_values
        for mask, found in zip([*train, *test], values, strict=True):
            check_values(mask.name, found, self.mask_values, self.out_channels)
        if not train_values:
            return
        classes, train_classes = self.out_channels, self.known_classes(train_values)
        if len(train_classes) < 2:
            found = ", ".join(map(str, sorted(train_values)))
            raise UserError(
                f"the training masks hold only {found}, which is one class or none: there is "
                f"nothing to tell apart. With objective.classes={classes} "
                f"{IGNORE_INDEX} is 'ignore'; with objective.classes=2 and masks of 0 and "
                f"{IGNORE_INDEX} alone it is class 1"
            )
        if test_values and not self.known_classes(test_values):
            raise UserError(
                f"the held-out masks hold only {IGNORE_INDEX}, 'ignore': nothing can be measured"
            )
        if missing := [k for k in range(classes) if k not in train_classes]:
            warnings.warn(
                f"objective.classes={classes}, but no training mask holds "
                f"{', '.join(map(str, missing[:MAX_NAMED_VALUES]))}: the model will not find what "
                "it has never seen",
                stacklevel=2,
            )

    def known_classes(self, values: frozenset[int]) -> frozenset[int]:
        """Which classes stand behind the values of masks."""
        if is_binary(self.mask_values, self.out_channels):
            return frozenset(value // 255 for value in values)
        return values - {IGNORE_INDEX}

    def read_target(self, picture: Picture) -> Image.Image:
        return read_mask(picture, self.out_channels, self.mask_values)

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

    def curves(self, figures: dict[str, float | str]) -> dict[str, float | str]:
        """dice and iou are the means over all classes but 0, the background."""
        classes = range(1, self.out_channels)
        means = {name: fmean(figures[f"{name}_{k}"] for k in classes) for name in ("dice", "iou")}
        return means | {"pixel_error": figures["pixel_error"]}
