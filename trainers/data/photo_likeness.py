"""Which of a run's photos are the same as others, nearly the same, or blurred."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.data.near_duplicates import find_near_duplicates
from trainers.data.pictures import Picture
from trainers.data.sharpness import BLURRED


def find_copies(pictures: Sequence[Picture]) -> dict[Picture, Picture]:
    """For each picture with the pixels of an earlier one, the first that has them."""
    first: dict[str, Picture] = {}
    for picture in pictures:
        first.setdefault(picture.facts.fingerprint, picture)
    owners = {picture: first[picture.facts.fingerprint] for picture in pictures}
    return {picture: owner for picture, owner in owners.items() if picture is not owner}


def find_near_copies(pictures: Sequence[Picture]) -> dict[Picture, Picture]:
    """For each picture that resembles one of as many pixels or more without being the same, that
    one: copies are mostly smaller."""
    copies = find_copies(pictures)
    others = [picture for picture in pictures if picture not in copies]
    others.sort(key=lambda picture: -picture.facts.size[0] * picture.facts.size[1])
    found = find_near_duplicates([picture.facts.perceptual_hash for picture in others])
    return {others[later]: others[earlier] for later, earlier in found.items()}


def find_blurred(pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures whose sharpest edges are not sharp."""
    blurs = [(picture, picture.facts.edge_blur) for picture in pictures]
    return [picture for picture, blur in blurs if blur is not None and blur > BLURRED]
