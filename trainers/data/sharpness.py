"""How blurred a picture is, by its sharpest edges.

An edge that a Gaussian of standard deviation s has blurred is made flatter by a second one of
standard deviation b, the more so the sharper it was: its slopes before and after are in the ratio
of sqrt(s^2 + b^2) to s (Zhuo & Sim, "Defocus map estimation from a single image", 2011). Only a
picture's steepest slopes are taken, so that a background out of focus does no harm, and neither
contrast nor noise changes the result much.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

SIDE = 512  # of the short side, beyond which pictures are made smaller before they are measured
LEAST_SIDE = 64
FIRST, SECOND = 1.0, 2.0  # standard deviations, in pixels
# The steepest slopes are those of this share of the pixels and, in a drawing with few edges, at
# least half as steep as the next share.
STEEP, STEEPEST = 0.01, 0.001
# Of 20 photos of objects the largest is 0.8. All are beyond this when they are blurred by 2 pixels
# of 512 or by a movement of 10, or enlarged 6 times (19 of them); 6 are when blurred by 1.3.
BLURRED = 1.5
LEAST_SLOPE = 1.0  # gray levels per pixel; a flatter picture has no edges
# of the steepest direction's slope; what is flatter is a shade, and no edge of that direction
EDGE_SHARE = 0.05


def to_measured_size(image: Image.Image) -> Image.Image:
    """Gray (mode L), with a short side of SIDE pixels or less."""
    gray, scale = image.convert("L"), SIDE / min(image.size)
    if scale >= 1:
        return gray
    width, height = (max(1, round(side * scale)) for side in image.size)
    return gray.resize((width, height), Image.Resampling.BOX, reducing_gap=2.0)


def edge_blur(gray: Image.Image) -> float | None:
    """The blur of the sharpest edges as a standard deviation, in pixels of a picture of mode L.

    It is that of the direction in which they are least sharp, for a shaken picture is sharp along
    the movement. None for pictures that are too small to tell, or have no edges.
    """
    if min(gray.size) < LEAST_SIDE:
        return None
    # Pillow's whole numbers are exact enough for steep slopes, and fast
    first = slopes(gray.filter(ImageFilter.GaussianBlur(FIRST)))
    second = slopes(gray.filter(ImageFilter.GaussianBlur(SECOND)))
    begin = [begin_of_steep(values) for values in first]
    least = max(LEAST_SLOPE, EDGE_SHARE * max(begin))
    pairs = zip(first, second, begin, strict=True)
    return max((blur_of(*pair) for pair in pairs if pair[2] >= least), default=None)


def slopes(gray: Image.Image) -> tuple[np.ndarray, ...]:
    """The absolute differences of neighbors: across, down, and along both diagonals."""
    values = np.asarray(gray, np.int16)
    right, down = values[:-1, 1:] - values[:-1, :-1], values[1:, :-1] - values[:-1, :-1]
    return abs(right), abs(down), abs(right + down), abs(right - down)


def begin_of_steep(slopes: np.ndarray) -> float:
    # every third pixel of every third row tells
    steep, steepest = np.quantile(slopes[::3, ::3], [1 - STEEP, 1 - STEEPEST])
    return float(max(steep, steepest / 2))


def blur_of(first: np.ndarray, second: np.ndarray, begin: float) -> float:
    """From the slopes of one direction after both filters, those from `begin` on."""
    steepest = first >= begin
    ratio = float(first[steepest].mean() / max(second[steepest].mean(), 1e-6))
    # solved for s: (s^2 + SECOND^2) / (s^2 + FIRST^2) = ratio^2
    squared = (SECOND**2 - (ratio * FIRST) ** 2) / max(ratio**2 - 1, 1e-6)
    return math.sqrt(max(squared, 0.0))
