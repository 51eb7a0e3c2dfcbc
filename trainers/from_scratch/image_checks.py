"""What the files of a set of pictures tell before they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainers.config import ImagesConfig
from trainers.data.folders import name_some
from trainers.data.intake import Intake
from trainers.data.pictures import Picture, check_bit_depth

MAX_INSPECTED = 1000  # of a large set every n-th picture is looked at


def inspect_pictures(pictures: Sequence[Picture], config: ImagesConfig, intake: Intake) -> None:
    """Note pictures that will be enlarged.

    Raises: UserError for a broken one, and where they use fewer bits than they would be read with.
    """
    interval = -(-len(pictures) // MAX_INSPECTED)
    inspected = pictures[::interval]
    check_bit_depth(inspected, config.bit_depth)
    small = [picture for picture in inspected if min(picture.storage.size) < config.resolution]
    if small and config.resize_to is not None:
        names = name_some([Path(picture.name).name for picture in small])
        intake.warn(
            f"{len(small)} of {len(inspected)} pictures are smaller than "
            f"data.resolution={config.resolution}, so enlarged: {names}"
        )
