"""The pictures of a DreamBooth run: of each set to learn, those that are held out, the class's."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from trainers.config import ConceptConfig, DataConfig
from trainers.data.folders import scan_folder
from trainers.data.intake import Intake
from trainers.data.pictures import (
    Picture,
    keep_readable,
    pictures_from_dataset,
    pictures_from_folder,
)
from trainers.errors import name_some

MAX_FACTOR = 20  # of class pictures that are repeated to balance concepts
SHARE_TOLERANCE = 0.02  # of a concept's share, up to which the smallest factors will do


def load_instance_pictures(data: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """The pictures to learn, concept by concept, each decoded once as a check. Raises: UserError
    for none, broken or uncaptioned ones."""
    intake, pictures = intake or Intake(), []
    for photos in data.sets:
        with intake.about(photos.name):
            if photos.dataset_name:
                found, source = pictures_from_dataset(photos, data, intake), photos.dataset_name
            else:
                folder, column = photos.instance_data_dir, photos.caption_column
                found = pictures_from_folder(folder, photos, data, intake, column)
                source = str(folder)
            pictures += keep_readable(found, data, source, intake)
    if data.concepts is not None:
        shares = [f"{name} {share:.0%}" for name, share in concept_shares(pictures).items()]
        intake.note(f"of the pictures of a step: {name_some(shares, 20)}")
    return pictures


def load_held_out_pictures(data: DataConfig, intake: Intake | None = None) -> list[Picture]:
    """Photos of the subjects that are only measured on; none where no set has such. Raises:
    UserError, as `load_instance_pictures`."""
    intake, pictures = intake or Intake(), []
    for photos in data.sets:
        folder = photos.held_out_dir
        if folder is None:
            continue
        # a folder without metadata may stand beside one that has it
        has_metadata = bool(scan_folder(folder).metadata) and not photos.dataset_name
        column = photos.caption_column if has_metadata else None
        with intake.about(photos.name):
            found = pictures_from_folder(folder, photos, data, intake, column)
            pictures += keep_readable(found, data, str(folder), intake)
    return pictures


def load_class_pictures(
    folder: Path,
    photos: ConceptConfig,
    data: DataConfig,
    names: Container[str] | None = None,
    intake: Intake | None = None,
) -> list[Picture]:
    """The first `num_class_images` pictures of the class folder of a set; without captions of their
    own they have the prompt.

    names: the file names of those that may be taken, if not all.
    """
    intake = intake or Intake()
    plain = {"instance_prompt": photos.class_prompts[0], "repeats": 1}
    unmasked = {"mask_dir": None, "use_alpha_mask": False}
    with intake.about(f"class of {photos.name}" if photos.name else ""):
        pictures = pictures_from_folder(
            folder, photos.model_copy(update=plain | unmasked), data, intake
        )
        allowed = [p for p in pictures if names is None or Path(p.name).name in names]
        used = allowed[: photos.num_class_images]
        if len(pictures) > len(used):
            intake.note(
                f"of {len(pictures)} class pictures {len(used)} are used (data.num_class_images)"
            )
        return keep_readable(used, data, str(folder), intake)


def concept_shares(pictures: Sequence[Picture]) -> dict[str, float]:
    """The share of each concept in the pictures that are drawn, by its name, in order."""
    counts: dict[str, int] = {}
    for picture in pictures:
        counts[picture.concept] = counts.get(picture.concept, 0) + picture.repeats
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def balance_class_pictures(
    data: DataConfig,
    by_set: Mapping[str, Sequence[Picture]],
    instance: Sequence[Picture],
    intake: Intake,
) -> list[Picture]:
    """The class pictures of all sets as one pool, in which each set counts as much as its concepts
    do among the instance pictures.

    by_set: by the name of the set's first concept.
    """
    if len(by_set) == 1:
        return [*chain(*by_set.values())]
    shares = concept_shares(instance)
    wanted = {}
    for photos, names in data.class_sets:
        wanted[photos.name] = sum(shares[name] for name in names)
    counts = [sum(p.repeats for p in by_set[name]) for name in wanted]
    factors = choose_factors([*wanted.values()], counts)
    pool = []
    for name, factor in zip(wanted, factors, strict=True):
        pool += [replace(p, repeats=p.repeats * factor) for p in by_set[name]]
    found = [f"{name} {share:.0%}" for name, share in concept_shares(pool).items()]
    intake.note(f"of the class pictures of a step: {name_some(found, 20)}")
    return pool


def choose_factors(shares: Sequence[float], counts: Sequence[int]) -> list[int]:
    """By which small whole number each count is multiplied so that the products are as the shares.

    The smallest that come within `SHARE_TOLERANCE`, or the nearest.
    """
    ratios = [share / count for share, count in zip(shares, counts, strict=True)]
    nearest, least = [1] * len(counts), float("inf")
    for scale in range(1, MAX_FACTOR + 1):
        factors = [max(1, round(scale * ratio / min(ratios))) for ratio in ratios]
        error = share_error(shares, counts, factors)
        if error < least:
            nearest, least = factors, error
        if least <= SHARE_TOLERANCE:
            break
    return nearest


def share_error(shares: Sequence[float], counts: Sequence[int], factors: Sequence[int]) -> float:
    """The largest difference between a wanted share and what the factors make of it, relative."""
    products = [count * factor for count, factor in zip(counts, factors, strict=True)]
    parts = [product / sum(products) for product in products]
    total = sum(shares)
    return max(abs(part * total / share - 1) for part, share in zip(parts, shares, strict=True))
