"""The config of the U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trainers.config.base_rules import Errors, SpecialKeys, irrelevant_keys
from trainers.config.base_sections import Section, field
from trainers.config.bounds import (
    Channels,
    LossWeight,
    Name,
    NoiseLevel,
    PathField,
    Pixels,
)
from trainers.config.from_scratch import ImagesConfig, ScratchConfig


class PairsConfig(ImagesConfig):
    """The pictures, and for some uses their masks or targets."""

    target_column: Name | None = field(
        None, "segment, pix2pix: column that holds the masks or the target pictures."
    )
    image_suffix: Name = field(
        "_image", "segment, pix2pix from image_dir: pictures are *SUFFIX.png and the like."
    )
    target_suffix: Name = field(
        "_mask", "segment, pix2pix from image_dir: suffix of the mask or target picture."
    )
    resolution: Pixels = field(256, "Side of the training pictures in pixels.")
    crop: bool = field(
        False,
        "Crop squares of that side at random instead of resizing; results keep the size of the "
        "input.",
    )

    @property
    def resize_to(self) -> int | None:
        return None if self.crop else self.resolution


class UNetModelConfig(Section):
    """The size of the U-Net."""

    width: Channels = field(32, "Channels of the first level; doubled at each further one.")
    levels: int = field(4, "Resolutions; each halves the one before.", ge=2, le=6)
    patch_size: int = field(
        1,
        "2: patches of 2 x 2 pixels are a place of the first level; four times faster.",
        ge=1,
        le=64,
    )


class UNetObjectiveConfig(Section):
    """The loss of each use of the U-Net."""

    classes: int = field(
        2,
        "segment: how many; masks hold 0, 1, ... and 255 for 'ignore'; if 2, 0 and 1 or 0 and 255.",
        ge=2,
        le=255,
    )
    dice_weight: LossWeight = field(
        1.0, "segment: weight of the Dice loss relative to the cross-entropy."
    )
    rebalanced: bool = field(
        False,
        "colorize: predict color classes, with larger weights for rare ones (Zhang et al. 2016).",
    )
    l1_weight: float = field(
        100.0,
        "pix2pix: weight of the absolute error relative to the adversarial loss.",
        gt=0,
        le=10_000,
    )
    adversarial: bool = field(True, "pix2pix: false leaves the adversarial loss out.")
    noise: NoiseLevel = field(
        0.1, "restore: standard deviation of the noise; pictures are in 0..1."
    )
    downscale: int = field(
        1, "restore: factor by which the input is smaller than the target.", ge=1, le=64
    )


PAIRED_USES = ("segment", "pix2pix")  # those that train on pictures with a counterpart

KEYS_BY_USE = [
    SpecialKeys(["segment"], "objective", ["classes", "dice_weight"]),
    SpecialKeys(["colorize"], "objective", ["rebalanced"]),
    SpecialKeys(["pix2pix"], "objective", ["l1_weight", "adversarial"]),
    SpecialKeys(["restore"], "objective", ["noise", "downscale"]),
    SpecialKeys(PAIRED_USES, "data", ["target_column", "image_suffix", "target_suffix"]),
]


class UNetConfig(ScratchConfig):
    """A U-Net from scratch: masks, colors, other pictures, or better ones."""

    kind: Literal["unet"] = field("unet", "Which trainer runs.")
    output_dir: PathField = field(
        Path("runs/unet"), "The run folder: everything that the run writes."
    )
    use: Literal["segment", "colorize", "pix2pix", "restore"] = field(
        "segment", "What the model is for."
    )
    model: UNetModelConfig = UNetModelConfig()
    data: PairsConfig = PairsConfig()
    objective: UNetObjectiveConfig = UNetObjectiveConfig()

    @property
    def can_accumulate(self) -> bool:
        return not self.is_adversarial

    @property
    def is_adversarial(self) -> bool:
        return self.use == "pix2pix" and self.objective.adversarial

    @property
    def validation_metrics(self) -> Mapping[str, str]:
        if self.use == "segment":
            return self.held_out_metrics("held_out_dice", "held_out_iou", "held_out_pixel_error")
        return self.held_out_metrics("held_out_psnr", "held_out_ssim")

    def errors(self) -> Errors:
        yield from super().errors()
        yield from irrelevant_keys(self, self.use, KEYS_BY_USE)
        data = self.data
        multiple = self.model.patch_size * 2 ** (self.model.levels - 1)
        if data.resolution % multiple:
            yield "data.resolution", f"must be a multiple of {multiple} for this model"
        if data.resolution % self.objective.downscale:
            yield "objective.downscale", f"must divide data.resolution, {data.resolution}"
        lacks_column = data.dataset_name is not None and data.target_column is None
        if self.use in PAIRED_USES and lacks_column:
            message = f"{self.use} requires the column with the target pictures or masks"
            yield "data.target_column", message
        if data.image_suffix == data.target_suffix:
            yield "data.target_suffix", "must differ from data.image_suffix"
        if self.use == "colorize" and data.channels != 3:
            yield "data.channels", "colorize requires color pictures: set data.channels to 3"
