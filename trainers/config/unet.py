"""The config of the U-Net: what it is for, and what suits each use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from trainers.config.base import (
    Section,
    field,
    irrelevant_keys,
)
from trainers.config.from_scratch import PairsConfig, ScratchConfig


class UNetModelConfig(Section):
    width: PositiveInt = field(
        32, "Channels of the first level; doubled at each further one.", multiple_of=8
    )
    levels: PositiveInt = field(4, "Resolutions; each halves the one before.", ge=2, le=6)
    patch_size: PositiveInt = field(
        1, "2: patches of 2 x 2 pixels are a place of the first level; four times faster."
    )


class UNetObjectiveConfig(Section):
    classes: int = field(
        2,
        "segment: how many; masks hold 0, 1, ... and 255 for 'ignore'; if 2, 0 and 1 or 0 and 255.",
        ge=2,
        le=255,
    )
    dice_weight: float = field(
        1.0, "segment: weight of the Dice loss beside the cross-entropy.", ge=0
    )
    rebalanced: bool = field(
        False, "colorize: classes of colour, rare ones heavier (Zhang et al. 2016)."
    )
    l1_weight: PositiveFloat = field(
        100.0, "pix2pix: weight of the absolute error beside the adversary's."
    )
    adversarial: bool = field(True, "pix2pix: false leaves the adversary out.")
    noise: float = field(
        0.1, "restore: standard deviation of the noise; pictures are in 0..1.", ge=0
    )
    downscale: PositiveInt = field(1, "restore: how many times smaller what is shown is.")


KEYS_BY_USE = [
    ("segment", "objective", "classes dice_weight"),
    ("colorize", "objective", "rebalanced"),
    ("pix2pix", "objective", "l1_weight adversarial"),
    ("restore", "objective", "noise downscale"),
    ("segment pix2pix", "data", "target_column image_suffix target_suffix"),
]


class UNetConfig(ScratchConfig):
    kind: Literal["unet"] = field("unet", "Which trainer runs.")
    output_dir: Path = field(Path("runs/unet"), "The run folder: everything that the run writes.")
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

    def errors(self) -> Iterator[tuple[str, str]]:
        yield from super().errors()
        yield from irrelevant_keys(self, self.use, KEYS_BY_USE)
        data, multiple = self.data, self.model.patch_size * 2 ** (self.model.levels - 1)
        if data.resolution % multiple:
            yield "data.resolution", f"must be a multiple of {multiple} for this model"
        if (
            self.use in ("segment", "pix2pix")
            and data.dataset_name is not None
            and data.target_column is None
        ):
            yield "data.target_column", f"{self.use} needs the column of what is wanted"
        if data.image_suffix == data.target_suffix:
            yield "data.target_suffix", "is that of the pictures themselves"
        if self.use == "colorize" and data.channels != 3:
            yield "data.channels", "colorize needs pictures in colour: 3"
