"""Masks that tell the class of each pixel."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from PIL import Image, ImageOps

from trainers.data.decoding import open_image
from trainers.data.pictures import Picture
from trainers.errors import UserError

IGNORE_INDEX = 255  # in a mask
MAX_NAMED_VALUES = 5  # in a message


def read_mask(
    picture: Picture, classes: int, all_values: frozenset[int] | None = None
) -> Image.Image:
    """Classes as a picture of mode P, which is resized by the nearest pixel.

    all_values: those of all masks of the data set; None: of this one. Where they are 0 and 255
    alone, and there are two classes, 255 is class 1; else it is to be ignored. Raises: UserError
    for other values.
    """
    array = read_values(picture, classes)
    values = frozenset(np.unique(array).tolist())
    all_values = all_values or values
    check_values(picture.name, values, all_values, classes)
    if is_binary(all_values, classes):
        array = array // 255
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette([level for level in range(256) for _ in range(3)])
    return image


def is_binary(values: Collection[int], classes: int) -> bool:
    """Whether masks are black and white: 0 and 255 for two classes."""
    return classes == 2 and {0, 255}.issuperset(values)


def check_values(
    name: str, values: Collection[int], all_values: Collection[int], classes: int
) -> None:
    """Raises: UserError naming values of a mask that are no class."""
    invalid = sorted(v for v in values if not 0 <= v < classes and v != IGNORE_INDEX)
    if is_binary(all_values, classes) or not invalid:
        return
    found_values = ", ".join(map(str, invalid[:MAX_NAMED_VALUES]))
    if len(invalid) > MAX_NAMED_VALUES:
        found_values += ", ..."
    allowed = f"0 to {classes - 1}, and {IGNORE_INDEX} for 'ignore'"
    if classes == 2:
        allowed += f", or all masks hold 0 and {IGNORE_INDEX} alone"
    raise UserError(
        f"{name} has the values {found_values}: with objective.classes={classes} a mask holds "
        f"{allowed}. JPEG spoils masks: save them as PNG"
    )


def find_values(mask: Picture, classes: int) -> frozenset[int]:
    """Raises: UserError for a mask that cannot be read."""
    return frozenset(np.unique(read_values(mask, classes)).tolist())


def read_values(picture: Picture, classes: int) -> np.ndarray:
    """(H, W) of int: the values of a mask, upright. Raises: UserError."""
    with picture.named_errors("mask"):
        with open_image(picture.read()) as stored:
            image = ImageOps.exif_transpose(stored)
        array = without_palette(image, classes)
    channels = array.reshape(*array.shape[:2], -1)
    channels = channels[..., :1] if channels.shape[2] == 2 else channels[..., :3]  # without alpha
    if (channels != channels[..., :1]).any():
        raise UserError(
            f"{picture.name} is in colour: a mask has one channel, which holds the class of each "
            f"pixel"
        )
    values = channels[..., 0].astype(int)
    fractions = channels[..., 0][values != channels[..., 0]]
    if fractions.size:
        raise UserError(
            f"{picture.name} has the value {fractions[0]:g}: a mask holds whole numbers, the class "
            "of each pixel"
        )
    return values


def without_palette(image: Image.Image, classes: int) -> np.ndarray:
    """The values (H, W) or (H, W, channels) of a mask.

    Programs that save few grays with a palette number them as they come, so that black may be 1
    and white 0: where all colors of a palette are grays that are classes, these are meant. The
    indices of any other palette are the classes themselves.
    """
    values = np.asarray(image)
    if image.mode != "P":
        return values
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = [index for index in np.unique(values) if index < len(palette)]
    colors = palette[used]
    is_gray = (colors == colors[:, :1]).all()
    if is_gray and ((colors < classes) | (colors == IGNORE_INDEX)).all():
        return palette[:, 0][np.minimum(values, len(palette) - 1)]
    return values
