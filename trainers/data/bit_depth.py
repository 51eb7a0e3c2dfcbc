"""How many bits deep pictures use, where their files do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainers.errors import UserError

if TYPE_CHECKING:
    from trainers.data.pictures import Picture

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of the values of cameras, scanners and microscopes


def is_deep(picture: Picture) -> bool:
    """Whether it has more than 8 bits per channel."""
    return picture.storage.has_deep_colors or picture.storage.has_deep_gray


def check_bit_depth(pictures: Sequence[Picture], bit_depth: int | None) -> None:
    """Raises: UserError where deep pictures use fewer bits than they would be read with, which
    would leave a few dark levels of them."""
    colors = [picture for picture in pictures if picture.storage.has_deep_colors]
    gray = [picture for picture in pictures if picture.storage.has_deep_gray]
    for group, is_told in ((colors, bit_depth == 16), (gray, bit_depth is not None)):
        if not group or is_told:
            continue
        largest = max(picture.largest_value for picture in group)
        bits = next((bits for bits in BIT_DEPTHS if largest < 2**bits), 16)
        if bits == 16:
            continue
        found = (
            f"data.bit_depth: {len(group)} pictures such as {group[0].name} have 16 bits and use "
            f"{bits} of them (the largest value is {largest})"
        )
        if group is colors:
            raise UserError(
                f"{found}; of colors the upper 8 bits are read: save them with 8 bits, or set "
                "data.bit_depth=16 if they are that dark"
            )
        raise UserError(f"{found}: set data.bit_depth={bits}, or 16 if they are that dark")
