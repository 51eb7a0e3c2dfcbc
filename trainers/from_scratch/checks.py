"""What to know about pictures before a small network is trained on them or shown them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from trainers.config import ImagesConfig, ScratchConfig
from trainers.data.intake import Intake
from trainers.data.pictures import Picture
from trainers.data.rng import choose_rows, derive_seed
from trainers.errors import UserError, name_some
from trainers.from_scratch.image_samples import choose_evenly, describe_folder
from trainers.from_scratch.image_sets import ImageSet

# a side that is so many times as long as the other still counts as equal
SQUARE_TOLERANCE = 1.05
MAX_MEASURED_PICTURES = 500  # whose sizes are read
MIN_HELD_OUT = 10  # pictures that a GAN is measured with


def warn_of_data(
    config: ScratchConfig, train: ImageSet, test: ImageSet | None, intake: Intake
) -> None:
    """Note what is not used, pictures that are squashed or enlarged, batches larger than the set,
    and held-out pictures that are trained on."""
    if config.data.image_dir is not None:
        describe_folder(config.data, train.samples[0].target is not None, intake)
    warn_of_squashing([sample.picture for sample in train.samples], config, intake.warn)
    warn_of_enlarging([s.picture for s in choose_evenly(train.samples)], config.data, intake)
    batch = config.train.train_batch_size
    if batch > len(train):
        intake.warn(
            f"train.train_batch_size: {batch} is more than the {len(train)} training pictures, so "
            "that a batch holds some of them more than once"
        )
    if test is None:
        return
    known = {sample.picture.digest for sample in train.samples}
    names = [s.picture.name for s in test.samples if s.picture.digest in known]
    if names:
        intake.warn(
            f"{len(names)} of {len(test)} held-out pictures are also training pictures, such as "
            f"{Path(names[0]).name}: the figures are too good"
        )


def warn_of_squashing(
    pictures: Sequence[Picture],
    config: ScratchConfig,
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Warn of pictures that are not square where all are resized to squares."""
    side = config.data.resize_to
    if side is None:
        return
    rows = choose_rows(derive_seed(config.seed, "sizes"), len(pictures), MAX_MEASURED_PICTURES)
    ratios = [(aspect_ratio(pictures[row]), pictures[row].name) for row in rows]
    squashed = [pair for pair in ratios if pair[0] > SQUARE_TOLERANCE]
    if squashed:
        ratio, name = max(squashed)
        remedy = (
            ", or train with data.crop=true, which cuts squares" if config.kind == "unet" else ""
        )
        warn(
            f"{len(squashed)} of {len(ratios)} pictures are not square and are squashed to {side} "
            f"x {side} pixels: of {Path(name).name} one side is {ratio:.2f} times as long as the "
            f"other. Crop pictures to squares first where shapes matter{remedy}"
        )


def warn_of_enlarging(pictures: Sequence[Picture], config: ImagesConfig, intake: Intake) -> None:
    small = [picture for picture in pictures if min(picture.storage.size) < config.resolution]
    if small and config.resize_to is not None:
        names = name_some([Path(picture.name).name for picture in small])
        intake.warn(
            f"{len(small)} of {len(pictures)} pictures are smaller than "
            f"data.resolution={config.resolution}, so enlarged: {names}"
        )


def aspect_ratio(picture: Picture) -> float:
    """The longer side over the shorter one; 1 for a picture that cannot be read, which the decoder
    reports."""
    try:
        size = picture.storage.size
    except UserError:
        return 1.0
    return max(size) / min(size)


def check_gan_measurable(train: ImageSet, test: ImageSet, by_classifier: bool) -> None:
    """Raises: UserError where the held-out pictures or the classes are too few to measure a GAN
    with."""
    if len(test) < MIN_HELD_OUT:
        raise UserError(
            f"{len(test)} pictures are held out, {MIN_HELD_OUT} are the fewest to measure with. "
            "Set data.test_split to null, or leave data.folds out, to measure nothing"
        )
    if by_classifier and len(train.labels.unique()) < 2:
        raise UserError(
            "validation.features: the training pictures are of one class, and a classifier of one "
            "class tells nothing apart. Set it to dino or inception, or set data.test_split "
            "to null, which measures nothing"
        )
