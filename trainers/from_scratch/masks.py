"""Masks, the class of each pixel, and how the second of a pair lies on the first."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from trainers.data.decoding import SIDEWAYS, TURNS, open_image
from trainers.data.pictures import Picture
from trainers.errors import UserError

IGNORE_INDEX = 255  # in a mask


def read_mask(picture: Picture, classes: int) -> Image.Image:
    """Classes as an upright picture of mode P, which is resized by the nearest pixel.

    Raises: UserError for other values.
    """
    with picture.named_errors("mask"):
        with open_image(picture.read()) as stored:
            image = ImageOps.exif_transpose(stored)
        array = mask_values(image, classes)
    channels = array.reshape(*array.shape[:2], -1)
    channels = channels[..., :1] if channels.shape[2] == 2 else channels[..., :3]  # without alpha
    if (channels != channels[..., :1]).any():
        raise UserError(
            f"{picture.name} is in colour: a mask has one channel, which holds the class of each "
            f"pixel"
        )
    array = channels[..., 0]
    if invalid := invalid_values(array, classes):
        found_values = ", ".join(f"{value:g}" for value in invalid[:5])
        found_values += ", ..." if len(invalid) > 5 else ""
        allowed = (
            "0 and 1, or 0 and 255"
            if classes == 2
            else f"0 to {classes - 1}, and {IGNORE_INDEX} for 'ignore'"
        )
        raise UserError(
            f"{picture.name} has the values {found_values}: with objective.classes={classes} a "
            f"mask holds {allowed}. "
            "JPEG spoils masks: save them as PNG"
        )
    if classes == 2 and array.max() == 255:
        array = array // 255
    mask = Image.fromarray(array.astype(np.uint8))
    mask.putpalette([level for level in range(256) for _ in range(3)])
    return mask


def mask_values(image: Image.Image, classes: int) -> np.ndarray:
    """The values (H, W) or (H, W, channels) of a mask.

    Programs that save few grays with a palette number them as they come, so that black may be 1
    and white 0: where all colors of a palette are grays that are classes, these are meant. The
    indices of any other palette are the classes themselves.
    """
    values = np.asarray(image)
    if image.mode != "P":
        return values.astype(np.uint8) if values.dtype == bool else values
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = [index for index in np.unique(values) if index < len(palette)]
    colors = palette[used]
    is_gray = (colors == colors[:, :1]).all()
    if is_gray and not invalid_values(colors[:, 0], classes):
        return palette[:, 0][np.minimum(values, len(palette) - 1)]
    return values


def invalid_values(values: np.ndarray, classes: int) -> list[float]:
    """The values that are no class, where `classes` are told apart."""
    found = np.unique(values).tolist()
    if classes == 2 and set(found) <= {0, 255}:
        return []
    invalid = []
    for value in found:
        is_class = 0 <= value < classes and value == int(value)
        is_ignored = value == IGNORE_INDEX and classes > 2
        if not is_class and not is_ignored:
            invalid.append(value)
    return invalid


def turn_alike(target: Image.Image, target_file: Picture, picture: Picture) -> Image.Image:
    """The decoded target as its picture lies, where that alone has an EXIF tag that turns it.

    Its size tells whether it was made for the stored picture or for the upright one. Raises:
    UserError where it does not.
    """
    stored = picture.storage
    if stored.orientation not in TURNS or target_file.storage.orientation != 1:
        return target
    if stored.size[0] == stored.size[1] or stored.orientation not in SIDEWAYS:
        raise UserError(
            f"{picture.name} is turned by its EXIF tag, and {target_file.name} has no such tag and "
            "the same size either way: save the picture upright, without the tag"
        )
    return target.transpose(TURNS[stored.orientation]) if target.size == stored.size else target
