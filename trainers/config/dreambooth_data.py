"""The data section of a DreamBooth config: every key with its default, help and limits."""

from __future__ import annotations

from typing import Literal

from trainers.config.base_sections import field
from trainers.config.bounds import LossWeight, PathField, Pixels, Probability
from trainers.config.photo_sections import PhotoSet


class DataConfig(PhotoSet):
    """The pictures, their captions and masks, and what the base model must not forget."""

    prior_loss_weight: LossWeight = field(1.0, "Weight of the prior-preservation loss.")
    mask_floor: Probability = field(
        0.1,
        "How much a place counts that the mask leaves out, where one that it shows counts 1; at 0 "
        "nothing is learnt of it.",
    )
    resolution: Pixels = field(512, "Side of the training pictures in pixels; a multiple of 8.")
    center_crop: bool = field(True, "Crop at the center; false crops at random.")
    random_flip: bool = field(False, "Mirror half of the pictures.")
    caption_dropout: Probability = field(
        0.0, "Share of captions that are replaced by the empty prompt."
    )
    cache: bool = field(
        True, "Encode pictures and prompts once, and free the encoders; false encodes at each step."
    )
    cache_dir: PathField | None = field(
        None, "Where encoded pictures are kept; null means OUTPUT_DIR/cache."
    )
    cache_variants: int = field(4, "Random crops and flips kept for each picture.", ge=1, le=10_000)
    bit_depth: Literal[8, 10, 12, 14, 16] | None = field(
        None, "Bits that gray pictures of 16 bits use, such as 12 of a microscope; null means 16."
    )
    skip_corrupt: bool = field(
        False, "Leave unreadable pictures out with a warning instead of stopping."
    )
    strict: bool = field(False, "Warnings about the data end the run before it trains.")

    @property
    def num_variants(self) -> int:
        # without chance in the crop, one variant is all there is
        return self.cache_variants if self.random_flip or not self.center_crop else 1
