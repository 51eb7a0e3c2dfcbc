"""Seeded pictures of textures and of a part, good ones and ones with defects, in MVTec's folders.

`train/good` and `test/good` are good; `test/KIND` has a defect each, whose place is white in
`ground_truth/KIND/NAME_mask.png`. All are gray, 64 x 64 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

SIDE = 64
TRAIN, TEST_GOOD, TEST_BAD = 60, 40, 20  # pictures; the last of each kind of defect
CAMERA_NOISE = 0.02  # standard deviation; pictures are in 0..1

Array = np.ndarray
Rng = np.random.Generator


def places() -> tuple[Array, Array]:
    """The row and the column of each pixel, (SIDE, SIDE) each."""
    return tuple(np.indices((SIDE, SIDE)).astype(float))


def brick(rng: Rng) -> Array:
    """A wall in running bond from anywhere: each brick of its own brightness, mortar, grain."""
    y, x = places()
    y, x = y + rng.uniform(0, 64), x + rng.uniform(0, 64)
    row = np.floor(y / 10)
    x = x + (row % 2) * 10
    column = np.floor(x / 20)
    tones = rng.uniform(0.4, 0.62, (200, 200))
    wall = tones[row.astype(int) % 200, column.astype(int) % 200]
    edge = np.minimum.reduce([y % 10, 10 - y % 10, (x % 20), 20 - x % 20])
    mortar = np.clip(1.6 - edge, 0, 1)
    grain = 0.05 * gaussian_filter(rng.standard_normal((SIDE, SIDE)), 0.8)
    return wall * (1 - mortar) + 0.8 * mortar + 2 * grain


def weave(rng: Rng) -> Array:
    """Threads over and under each other, whose width and direction vary a little."""
    y, x = places()
    angle, pitch = rng.normal(0, 0.03), rng.uniform(5.6, 6.4)
    u = (np.cos(angle) * x + np.sin(angle) * y + rng.uniform(0, 12)) * np.pi / pitch
    v = (np.cos(angle) * y - np.sin(angle) * x + rng.uniform(0, 12)) * np.pi / pitch
    over = (np.floor(u / np.pi) + np.floor(v / np.pi)) % 2
    threads = np.where(over > 0, np.abs(np.sin(u)), np.abs(np.sin(v)))
    wobble = gaussian_filter(rng.standard_normal((SIDE, SIDE)), 3)
    return 0.3 + 0.35 * threads + 0.3 * wobble * over


def washer(rng: Rng) -> Array:
    """A part: a notched disc with a bore and six holes, turned and shifted a little, brushed."""
    y, x = places()
    y, x = y - 31.5 - rng.uniform(-2, 2), x - 31.5 - rng.uniform(-2, 2)
    radius, angle = np.hypot(y, x), np.arctan2(y, x) + rng.normal(0, 0.08)

    def inside(distance: Array) -> Array:
        return np.clip(0.5 - distance, 0, 1)

    disc = inside(radius - 26) * (1 - inside(radius - 8))
    for k in range(6):
        center = k * np.pi / 3
        hole = np.hypot(radius * np.cos(angle - center) - 17, radius * np.sin(angle - center))
        disc = disc * (1 - inside(hole - 3))
    notch = inside(np.abs(radius * np.sin(angle - 0.5)) - 2) * (np.cos(angle - 0.5) > 0)
    disc = disc * (1 - notch * inside(22 - radius))
    brushed = gaussian_filter(rng.standard_normal((SIDE, SIDE)), (0.5, 4))
    return 0.15 + disc * (0.5 + 0.12 * brushed + 0.05 * np.cos(2 * angle))


SUBJECTS: dict[str, Callable[[Rng], Array]] = {"brick": brick, "weave": weave, "washer": washer}


def somewhere(rng: Rng) -> tuple[float, float]:
    """A place on the subject, away from the edge of the picture."""
    radius, angle = rng.uniform(10, 22), rng.uniform(0, 2 * np.pi)
    return 32 + radius * np.sin(angle), 32 + radius * np.cos(angle)


def scratch(picture: Array, rng: Rng) -> tuple[Array, Array]:
    """A bent line, a little more than a pixel wide, lighter or darker than what it crosses."""
    y, x = places()
    top, left = somewhere(rng)
    angle, length = rng.uniform(0, np.pi), rng.uniform(12, 22)
    along = (x - left) * np.cos(angle) + (y - top) * np.sin(angle)
    across = (y - top) * np.cos(angle) - (x - left) * np.sin(angle)
    across = across - rng.uniform(-0.02, 0.02) * along**2
    line = np.clip(1.3 - np.abs(across), 0, 1) * (np.abs(along) < length / 2)
    return picture + rng.choice([-1, 1]) * rng.uniform(0.18, 0.35) * line, line > 0.3


def stain(picture: Array, rng: Rng) -> tuple[Array, Array]:
    """A faint dark or light spot with soft edges."""
    y, x = places()
    top, left = somewhere(rng)
    blob = np.hypot((y - top) / rng.uniform(4, 7), (x - left) / rng.uniform(4, 7))
    spot = np.clip(1.5 - blob, 0, 1)
    return picture + rng.choice([-1, 1]) * rng.uniform(0.1, 0.2) * spot, spot > 0.3


def displaced(picture: Array, rng: Rng) -> tuple[Array, Array]:
    """A square of the picture itself, turned by 90 degrees: only the order is new."""
    side = int(rng.integers(11, 17))
    top, left = (int(p) - side // 2 for p in somewhere(rng))
    square = picture[top : top + side, left : left + side]
    result, mask = picture.copy(), np.zeros(picture.shape, bool)
    result[top : top + side, left : left + side] = np.rot90(square)
    mask[top : top + side, left : left + side] = True
    return result, mask


DEFECTS: dict[str, Callable[[Array, Rng], tuple[Array, Array]]] = {
    "scratch": scratch,
    "stain": stain,
    "displaced": displaced,
}


def write_subject(subject: str, seed: int, folder: Path) -> Path:
    """All pictures of a subject, a function of its name and the seed. Returns the folder."""
    if (folder / "done").exists():
        return folder
    rng = np.random.default_rng([seed, *subject.encode()])
    draw = SUBJECTS[subject]

    def photo(picture: Array) -> Image.Image:
        noisy = picture + CAMERA_NOISE * rng.standard_normal(picture.shape)
        return Image.fromarray((255 * np.clip(noisy, 0, 1)).round().astype(np.uint8))

    for part, count in (("train", TRAIN), ("test", TEST_GOOD)):
        (folder / part / "good").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photo(draw(rng)).save(folder / part / "good" / f"{i:03d}.png")
    for kind, spoil in DEFECTS.items():
        for place in ("test", "ground_truth"):
            (folder / place / kind).mkdir(parents=True, exist_ok=True)
        for i in range(TEST_BAD):
            picture, mask = spoil(draw(rng), rng)
            photo(picture).save(folder / "test" / kind / f"{i:03d}.png")
            name = folder / "ground_truth" / kind / f"{i:03d}_mask.png"
            Image.fromarray((255 * mask).astype(np.uint8)).save(name)
    (folder / "done").touch()
    return folder
