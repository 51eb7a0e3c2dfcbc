"""Pictures that are nearly the same: copies that were resized, saved anew or cut a little."""

from __future__ import annotations

from collections.abc import Sequence

import imagehash
import numpy as np
from PIL import Image

HASH_SIDE = 16
NUM_BITS = HASH_SIDE**2
# Of 20 photos of 4 objects, two of the same object differ in 102 bits at least. Copies differ from
# their photo in 4 when saved as JPEG of quality 20 or made a sixth as wide, in 44 when 5 % of each
# side were cut off in equal parts at both ends, and in 46 when 2 % were at one end.
MAX_DIFFERENT_BITS = 64
LEAST_CONTRAST = 2.0  # gray levels; below, a picture shows nothing and resembles all such pictures
ROWS_AT_ONCE = 512


def perceptual_hash(gray: Image.Image) -> str | None:
    """Hexadecimal digits that are alike for pictures (mode L) that look alike; None for one that
    shows nothing."""
    if np.asarray(gray).std() < LEAST_CONTRAST:
        return None
    return str(imagehash.phash(gray, HASH_SIDE))


def find_near_duplicates(hashes: Sequence[str | None]) -> dict[int, int]:
    """For each picture that resembles an earlier one, the number of the one that it is nearest
    to."""
    known = [number for number, text in enumerate(hashes) if text is not None]
    digits = bytes.fromhex("".join(hashes[number] for number in known))
    bits = np.unpackbits(np.frombuffer(digits, np.uint8)).reshape(-1, NUM_BITS)
    signs = 1 - 2 * bits.astype(np.float32)
    found = {}
    for start in range(0, len(known), ROWS_AT_ONCE):
        # of two rows of signs, the product is NUM_BITS - 2 x the bits in which they differ
        different = (NUM_BITS - signs[start : start + ROWS_AT_ONCE] @ signs.T) / 2
        for row, distances in enumerate(different, start):
            earlier = distances[:row]
            if row and earlier.min() <= MAX_DIFFERENT_BITS:
                found[known[row]] = known[int(earlier.argmin())]
    return found
