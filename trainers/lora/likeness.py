"""What the LoRA draws while it trains, compared with the photos and with what the base draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from trainers.config import DreamBoothConfig
from trainers.data.caption_variants import subject_prompts
from trainers.data.crops import Crop
from trainers.data.pictures import Picture
from trainers.data.rng import choose_rows, derive_seed
from trainers.distributed.collectives import run_across_processes
from trainers.families import Family
from trainers.families.sampling import PromptEncoder, sample_picture, without_lora
from trainers.metrics.feature_networks import FeatureNetwork, find_likeness_network
from trainers.metrics.lora_quality import drift, fidelity

MAX_PHOTOS = 32  # that pictures are compared with


class Likeness:
    """Draws a few pictures of the subject and of the class, always from the same noise."""

    def __init__(
        self,
        family: Family,
        config: DreamBoothConfig,
        encode: PromptEncoder,
        network: FeatureNetwork,
        photos: Sequence[Picture],
    ) -> None:
        """encode: as `sample_picture` takes it; photos: of the subject."""
        self.family, self.config, self.encode = family, config, encode
        self.network = network
        rows = choose_rows(derive_seed(config.seed, "likeness"), len(photos), MAX_PHOTOS)
        self.photos = [photos[row] for row in rows]
        self.photo_features: Tensor | None = None
        self.base_features: Tensor | None = None  # of the base's pictures of the class

    def measure(self, joint: Accelerator | None) -> dict[str, float]:
        """subject, and where the class has a prompt and the base is at hand prior_drift,
        class_bleed (the likeness of the class to the subject, above the base's) and
        subject_less_drift.

        joint: the accelerator of the processes that sample together, if they do.
        """
        if self.photo_features is None:
            pixels = decode_square(self.photos, self.config.data.max_resolution)
            self.photo_features = self.network.encode_pictures(pixels)
        subject = self.draw(subject_prompts(self.config.data), joint)
        values = {"subject": fidelity(subject, self.photo_features)}
        class_prompts = self.config.data.class_prompts
        if not class_prompts or self.config.lora is None:
            return values
        if self.base_features is None:
            with without_lora(self.family):
                self.base_features = self.draw(class_prompts, joint)
        drawn = self.draw(class_prompts, joint)
        values["prior_drift"] = drift(drawn, self.base_features)
        base_likeness = fidelity(self.base_features, self.photo_features)
        values["class_bleed"] = fidelity(drawn, self.photo_features) - base_likeness
        values["subject_less_drift"] = values["subject"] - values["prior_drift"]
        return values

    def draw(self, prompts: Sequence[str], joint: Accelerator | None) -> Tensor:
        """Features (N, D) of the pictures, whose prompts take turns."""
        validation, side = self.config.validation, self.config.data.max_resolution
        jobs: list[Callable[[], Image]] = []
        for i in range(validation.likeness_pictures):
            settings = validation, validation.seed + i, (side, side), self.encode
            prompt = prompts[i % len(prompts)]
            jobs.append(partial(sample_picture, self.family, prompt, *settings))
        pictures = run_across_processes(jobs, joint) if joint else [job() for job in jobs]
        return self.network.encode_pictures(torch.stack([Crop.square(side)(p) for p in pictures]))


def make_likeness(
    family: Family, config: DreamBoothConfig, encode: PromptEncoder, photos: Sequence[Picture]
) -> Likeness | None:
    """None where the config asks for none. Raises: UserError without a network to compare in."""
    if not config.validation.likeness_pictures:
        return None
    network = find_likeness_network(config.validation.likeness_network, family.device)
    return Likeness(family, config, encode, network, photos)


def decode_square(photos: Sequence[Picture], size: int) -> Tensor:
    """The photos as (N, 3, size, size), cut at their center."""
    return torch.stack([Crop.square(size)(photo.decode()) for photo in photos])
