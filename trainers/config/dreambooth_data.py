"""The data section of a DreamBooth config: every key with its default, help and limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainers.config.base_sections import Section, field
from trainers.config.bounds import (
    LossWeight,
    Name,
    NameOrPath,
    PathField,
    Pixels,
    Probability,
    Prompt,
)

Trigger = Annotated[str, Field(max_length=100)]
Prompts = Annotated[list[Prompt], Field(max_length=1000)]
Resolutions = Annotated[list[Pixels], Field(min_length=1, max_length=8)]


class DataConfig(Section):
    """The pictures, their captions, and what the base model must not forget."""

    instance_data_dir: PathField | None = field(
        None, "Folder with the training pictures, in sub-folders too."
    )
    held_out_dir: PathField | None = field(
        None, "Other pictures of the subject, used for evaluation only: held_out_loss."
    )
    dataset_name: NameOrPath | None = field(
        None, "Instead of a folder: a `datasets` Hub name, local folder or .parquet file."
    )
    dataset_split: Name = field("train", "Split of dataset_name.")
    image_column: Name = field("image", "Column of dataset_name that holds the pictures.")
    caption_column: Name | None = field(
        None,
        "Column of dataset_name, metadata.jsonl or metadata.csv with the captions; null: the first "
        "of text, caption and prompt in metadata, none of dataset_name.",
    )
    instance_prompt: Prompt | None = field(
        None, "Caption of every picture that has none of its own."
    )
    caption_lines: Literal["join", "choose"] = field(
        "join",
        "Several lines of a caption: join makes one caption of them, with choose each line is one, "
        "and a visit of the picture draws one of them.",
    )
    trigger: Trigger | None = field(
        None,
        "The word that is taught; it replaces {trigger} and [trigger] in captions and prompts.",
    )
    caption_prefix: Prompt = field(
        "", "Before every caption of the training pictures, with a space between."
    )
    caption_suffix: Prompt = field("", "After every caption of the training pictures.")
    shuffle_tags: bool = field(
        False, "Put the tags of a caption, which commas separate, in another order at each visit."
    )
    keep_tags: int = field(
        0, "How many tags at the beginning stay in place and are never dropped.", ge=0, le=1000
    )
    tag_dropout: Probability = field(
        0.0, "Share of tags that are left out; never those of keep_tags or with the trigger."
    )
    caption_variants: int = field(
        8,
        "How many texts with shuffled or dropped tags are drawn and cached for each caption.",
        ge=1,
        le=10_000,
    )
    class_data_dir: PathField | None = field(
        None, "Folder of class pictures; null means OUTPUT_DIR/class_images."
    )
    class_prompt: Prompt | Prompts | None = field(
        None,
        "What prior preservation protects: 'a photo of a dog', or several prompts that the class "
        "pictures take in turn.",
    )
    num_class_images: int = field(
        0,
        "Number of class pictures; the base model generates those that are missing.",
        ge=0,
        le=1_000_000,
    )
    prior_loss_weight: LossWeight = field(1.0, "Weight of the prior-preservation loss.")
    resolution: Pixels | Resolutions = field(
        512,
        "Side in pixels of a square with the area of the training pictures; several train each "
        "picture at several areas.",
    )
    buckets: bool = field(
        True,
        "Train pictures in sizes of about their own shape; false cuts them to squares.",
    )
    max_upscale: float = field(
        2.0,
        "How far a picture may be enlarged; smaller ones are trained at a smaller area.",
        ge=1,
        le=100,
    )
    center_crop: bool = field(True, "Crop at the center; false crops at random.")
    random_flip: bool = field(False, "Mirror half of the pictures.")
    crop_jitter: float = field(
        0.0,
        "Cut up to this share off the sides of a crop, and enlarge the rest; each of the "
        "cache_variants otherwise.",
        ge=0,
        le=0.3,
    )
    color_jitter: float = field(
        0.0,
        "Change brightness, contrast and saturation by up to this share; each of the "
        "cache_variants otherwise.",
        ge=0,
        le=0.2,
    )
    caption_dropout: Probability = field(
        0.0, "Share of captions that are replaced by the empty prompt."
    )
    cache: bool = field(
        True, "Encode pictures and prompts once, and free the encoders; false encodes at each step."
    )
    cache_dir: PathField | None = field(
        None, "Where encoded pictures are kept; null means OUTPUT_DIR/cache."
    )
    encode_batch_size: int = field(
        1,
        "Pictures of one size, or prompts, that are encoded together: the same within rounding. On "
        "a CPU tiny autoencoders and T5 took half the time with 8, larger autoencoders no less.",
        ge=1,
        le=1024,
    )
    cache_variants: int = field(
        4, "Random crops, flips and jitters kept for each picture.", ge=1, le=10_000
    )
    bit_depth: Literal[8, 10, 12, 14, 16] | None = field(
        None, "Bits that gray pictures of 16 bits use, such as 12 of a microscope; null means 16."
    )
    skip_corrupt: bool = field(
        False, "Leave unreadable pictures out with a warning instead of stopping."
    )
    strict: bool = field(False, "Warnings about the data end the run before it trains.")

    @property
    def resolutions(self) -> list[int]:
        """The sides of the squares whose areas are trained, the smallest first."""
        sides = self.resolution if isinstance(self.resolution, list) else [self.resolution]
        return sorted(set(sides))

    @property
    def max_resolution(self) -> int:
        """The side of the largest square that is trained, and of the pictures that are sampled."""
        return self.resolutions[-1]

    @property
    def uses_prior(self) -> bool:
        return self.num_class_images > 0

    @property
    def varies_tags(self) -> bool:
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def class_prompts(self) -> list[str]:
        """Class picture i shows the prompt i modulo their number."""
        if isinstance(self.class_prompt, str):
            return [self.class_prompt]
        return self.class_prompt or []

    @property
    def num_variants(self) -> int:
        # without chance in the crop, one variant is all there is
        is_varied = self.random_flip or self.crop_jitter or self.color_jitter
        return self.cache_variants if is_varied or not self.center_crop else 1
