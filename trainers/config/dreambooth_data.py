"""The data section of a DreamBooth config: every key with its default, help and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainers.config.base_sections import field
from trainers.config.bounds import LossWeight, PathField, Pixels, Probability, Prompt
from trainers.config.photo_sections import (
    ConceptConfig,
    Concepts,
    PhotoSet,
    Prompts,
    Trigger,
    concept_name,
)
from trainers.config.trigger import fill_value

Resolutions = Annotated[list[Pixels], Field(min_length=1, max_length=8)]


class DataConfig(PhotoSet):
    """The pictures, their captions and masks, and what the base model must not forget."""

    concepts: Concepts | None = field(
        None,
        "Several subjects in one run: a list of sets, each with the keys above and its name and "
        "repeats, instead of those keys here.",
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
    prior: Literal["class_images", "output_preservation", "none"] = field(
        "class_images",
        "How class_prompt is kept as the base has it: class_images trains on pictures of it, "
        "output_preservation on the base's own predictions for the photos and needs no pictures; "
        "none trains on the photos alone.",
    )
    preserve_prompts: Prompts = field(
        [],
        "Other things that output_preservation keeps as the base has them, unlike the class: "
        "'a photo of a red house'.",
    )
    prior_loss_weight: LossWeight = field(1.0, "Weight of the prior-preservation loss.")
    mask_floor: Probability = field(
        0.1,
        "How much a place counts that the mask leaves out, where one that it shows counts 1; at 0 "
        "nothing is learnt of it.",
    )
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
    def sets(self) -> list[ConceptConfig]:
        """The sets of pictures with their names, and with their triggers in their prompts; that of
        the keys here is called ""."""
        if self.concepts is None:
            keys = {key: getattr(self, key) for key in PhotoSet.model_fields}
            return [ConceptConfig.model_construct(**keys, name="", trigger=self.trigger)]
        named = []
        for i, concept in enumerate(self.concepts):
            trigger = concept.trigger or self.trigger
            prompts = {key: getattr(concept, key) for key in ("instance_prompt", "class_prompt")}
            filled = {key: fill_value(prompt, trigger or "") for key, prompt in prompts.items()}
            own = {"name": concept_name(concept.name, i), "trigger": trigger}
            named.append(concept.model_copy(update=own | filled))
        return named

    @property
    def picture_folders(self) -> list[Path]:
        """Every folder that the sets name; none is read as a part of another."""
        keys = ("instance_data_dir", "held_out_dir", "class_data_dir", "mask_dir")
        folders = [getattr(photos, key) for photos in self.sets for key in keys]
        return [folder for folder in folders if folder is not None]

    @property
    def class_sets(self) -> list[tuple[ConceptConfig, list[str]]]:
        """The sets with class pictures, and the concepts of each.

        Concepts with the same class prompts and folder share the pictures of the first: as many
        as the largest of their numbers.
        """
        shared: dict[tuple, list[ConceptConfig]] = {}
        for photos in self.sets:
            if photos.num_class_images and self.prior == "class_images":
                key = (photos.class_data_dir, *photos.class_prompts)
                shared.setdefault(key, []).append(photos)
        found = []
        for group in shared.values():
            most = max(photos.num_class_images for photos in group)
            first = group[0].model_copy(update={"num_class_images": most})
            found.append((first, [photos.name for photos in group]))
        return found

    @property
    def instance_prompts(self) -> list[str]:
        """Of the sets that have one."""
        return [photos.instance_prompt for photos in self.sets if photos.instance_prompt]

    @property
    def varies_tags(self) -> bool:
        return self.shuffle_tags or self.tag_dropout > 0

    @property
    def triggers(self) -> list[str]:
        """Of the sets that have one."""
        return list(dict.fromkeys(photos.trigger for photos in self.sets if photos.trigger))

    @property
    def class_prompts(self) -> list[str]:
        """Of all sets."""
        prompts = [prompt for photos in self.sets for prompt in photos.class_prompts]
        return list(dict.fromkeys(prompts))

    @property
    def preserves_outputs(self) -> bool:
        return self.prior == "output_preservation"

    @property
    def kept_prompts(self) -> list[str]:
        """Those of the classes, and the others that the base must not forget."""
        return list(dict.fromkeys([*self.class_prompts, *self.preserve_prompts]))

    @property
    def uses_prior(self) -> bool:
        """Whether as many rows as there are of photos keep what the base knows."""
        return self.preserves_outputs or bool(self.class_sets)

    @property
    def has_masks(self) -> bool:
        return any(photos.has_masks for photos in self.sets)

    @property
    def num_variants(self) -> int:
        # without chance in the crop, one variant is all there is
        is_varied = self.random_flip or self.crop_jitter or self.color_jitter
        return self.cache_variants if is_varied or not self.center_crop else 1
