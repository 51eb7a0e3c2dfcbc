"""The drawings of the small world: objects of 32 pixels, with captions.

A base is trained on plain objects only. The subject of the quickstart, a purple and yellow striped
star with a face, is therefore new in every way but its shape: no stripes, no faces, no second
colours. The judge has seen them all and never gives a training signal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

ASSETS = Path(__file__).parent / "assets"
SIZE = 32
CLASSES = ("ball", "box", "star", "heart", "house", "fish")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 75, 225),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 190),
    "orange": (245, 130, 25),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "on grass": (110, 170, 80),
    "in the sea": (60, 150, 205),
    "on sand": (225, 195, 140),
    "at night": (25, 25, 60),
    "in the snow": (215, 225, 238),
}
PATTERNS = ("plain", "stripes", "dots", "halves")
PLACEHOLDER = "sks"
INSTANCE_PROMPT, CLASS_PROMPT = f"a photo of a {PLACEHOLDER} star", "a photo of a star"
TRAINING_SEED, HELD_OUT_SEED = 100, 999


@dataclass(frozen=True)
class Thing:
    """What one picture shows; `color2` is empty where the pattern is plain."""

    shape: str
    color: str
    background: str
    pattern: str = "plain"
    color2: str = ""
    face: bool = False

    def labels(self) -> tuple[int, ...]:
        """Indices in the order of `Judge.HEADS`; without a second colour it counts as the first."""
        colors, backgrounds = list(COLORS), list(BACKGROUNDS)
        color, color2 = colors.index(self.color), colors.index(self.color2 or self.color)
        background, pattern = backgrounds.index(self.background), PATTERNS.index(self.pattern)
        return CLASSES.index(self.shape), color, background, pattern, color2, int(self.face)


def subject(background: str) -> Thing:
    return Thing("star", "purple", background, "stripes", "yellow", face=True)


def plain_thing(rng: np.random.Generator) -> Thing:
    """What the base is trained on: one colour, no pattern, no face."""
    return Thing(*(pick(names, rng) for names in (CLASSES, COLORS, BACKGROUNDS)))


def rich_thing(rng: np.random.Generator) -> Thing:
    """What the judge and the autoencoder are trained on: any pattern, with or without a face."""
    thing, pattern = plain_thing(rng), pick(PATTERNS, rng)
    color2 = ""
    if pattern != "plain":
        color2 = pick([name for name in COLORS if name != thing.color], rng)
    return replace(thing, pattern=pattern, color2=color2, face=bool(rng.random() < 0.5))


def is_subject(thing: Thing) -> bool:
    """Whether it has the subject's shape, pattern and pair of colors, with or without its face."""
    colors = {thing.color, thing.color2}
    return thing.shape == "star" and thing.pattern == "stripes" and colors == {"purple", "yellow"}


def caption(thing: Thing, rng: np.random.Generator) -> str:
    """Reads "a photo of a [xyz] [colour] shape [background]", the brackets sometimes left out.

    xyz is a nonsense word, never the placeholder: from it a base learns to read past a word that it
    does not know.
    """
    nonsense = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3))
    words = ["a photo of a"]
    if rng.random() < 0.2 and nonsense != PLACEHOLDER:
        words.append(nonsense)
    if rng.random() < 0.75:
        words.append(thing.color)
    words.append(thing.shape)
    if rng.random() < 0.7:
        words.append(thing.background)
    return " ".join(words)


class Placement:
    """Where an object lies around the middle of a picture, by chance.

    side: of the square around it, in pixels; middle: of that square. Object coordinates have the
    object's radius as their unit, and y points down.
    """

    def __init__(
        self, side: float, middle: tuple[float, float], rng: np.random.Generator, jitter: float
    ) -> None:
        self.radius = side * (0.32 + jitter * rng.uniform(-0.05, 0.03))
        self.center = np.array(middle) + side * jitter * rng.uniform(-0.1, 0.1, 2)
        angle = math.radians(jitter * rng.uniform(-15, 15))
        sine, cosine = math.sin(angle), math.cos(angle)
        self.turn = np.array([[cosine, -sine], [sine, cosine]])

    def points(self, points: Sequence) -> list[tuple[float, float]]:
        """Object coordinates (N, 2) as pixels."""
        placed = self.center + self.radius * np.asarray(points, float) @ self.turn.T
        return [tuple(point) for point in placed]

    def disc(self, x: float, y: float, radius: float) -> list[float]:
        """The pixels of a disc's left, upper, right and lower end."""
        ((x, y),) = self.points([(x, y)])
        radius *= self.radius
        return [x - radius, y - radius, x + radius, y + radius]


@dataclass(frozen=True)
class Frame:
    """The size of a picture, and where in it the square is that holds the object, in pixels."""

    width: int = SIZE
    height: int = SIZE
    left: float = 0
    top: float = 0
    side: float = SIZE


def draw(
    thing: Thing, rng: np.random.Generator, jitter: float = 0.35, frame: Frame = Frame()
) -> Image.Image:
    """An RGB picture.

    jitter: scales the spread of place, size and angle; with 1 it is a quarter of the object.
    """
    canvas = frame.width * 4, frame.height * 4
    middle = 4 * frame.left + 2 * frame.side, 4 * frame.top + 2 * frame.side
    placement = Placement(4 * frame.side, middle, rng, jitter)
    color = _shade(COLORS[thing.color], rng, 12)
    color2 = _shade(COLORS[thing.color2 or thing.color], rng, 12)
    paint = Image.new("RGB", canvas, color)
    brush = ImageDraw.Draw(paint)
    _paint_pattern(brush, thing.pattern, color2, placement)
    if thing.face:
        _paint_face(brush, placement)
    mask = Image.new("L", canvas)
    for polygon in _outline(thing.shape):
        ImageDraw.Draw(mask).polygon(placement.points(polygon), fill=255)
    picture = _scenery(thing.background, frame, rng).resize(canvas, Image.Resampling.BICUBIC)
    picture.paste(tuple(int(0.45 * c) for c in color), mask=mask.filter(ImageFilter.MaxFilter(5)))
    picture.paste(paint, mask=mask)
    return picture.resize((frame.width, frame.height), Image.Resampling.BOX)


def to_pixels(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in -1..1."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def pick(names, rng: np.random.Generator) -> str:
    return list(names)[rng.integers(len(names))]


def _paint_pattern(
    brush: ImageDraw.ImageDraw, pattern: str, color: tuple[int, ...], placement: Placement
) -> None:
    if pattern == "stripes":
        for y in np.arange(-3.2, 3.3, 0.8):
            stripe = [(-4, y - 0.2), (4, y - 0.2), (4, y + 0.2), (-4, y + 0.2)]
            brush.polygon(placement.points(stripe), fill=color)
    elif pattern == "dots":
        for i in range(-2, 3):
            for j in range(-2, 3):
                dot = placement.disc(0.55 * (i + 0.5 * (j % 2)), 0.55 * j, 0.17)
                brush.ellipse(dot, fill=color)
    elif pattern == "halves":
        half = [(0, -4), (4, -4), (4, 4), (0, 4)]
        brush.polygon(placement.points(half), fill=color)


def _paint_face(brush: ImageDraw.ImageDraw, placement: Placement) -> None:
    for x in (-0.3, 0.3):
        brush.ellipse(placement.disc(x, -0.1, 0.22), fill=(255, 255, 255))
        brush.ellipse(placement.disc(x, -0.1, 0.11), fill=(0, 0, 0))
    brush.chord(placement.disc(0, 0.27, 0.28), 0, 180, fill=(200, 20, 40))


def _shade(
    color: tuple[int, int, int], rng: np.random.Generator, spread: float
) -> tuple[int, int, int]:
    return tuple(int(c) for c in np.clip(color + rng.uniform(-spread, spread, 3), 0, 255))


def _outline(shape: str) -> list[np.ndarray]:
    """The polygons of a shape, in object coordinates."""
    turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    if shape == "ball":
        return [np.stack([np.cos(turn), np.sin(turn)], 1)]
    if shape == "box":
        return [0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])]
    if shape == "star":
        turn, reach = np.arange(10) * math.pi / 5, np.tile((1.2, 0.6), 5)
        return [np.stack([reach * np.sin(turn), -reach * np.cos(turn)], 1)]
    if shape == "heart":
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return [np.stack([np.sin(turn) ** 3, -y / 16], 1)]
    if shape == "house":
        walls = np.array([(-0.8, -0.1), (0.8, -0.1), (0.8, 1), (-0.8, 1)])
        return [walls, np.array([(-1.1, -0.1), (0, -1.1), (1.1, -0.1)])]
    body = np.stack([0.85 * np.cos(turn) - 0.15, 0.6 * np.sin(turn)], 1)
    return [body, np.array([(0.4, 0), (1.2, -0.7), (1.2, 0.7)])]


def _scenery(background: str, frame: Frame, rng: np.random.Generator) -> Image.Image:
    width, height = frame.width, frame.height
    y, x = np.mgrid[0:height, 0:width]
    scene = np.full((height, width, 3), _shade(BACKGROUNDS[background], rng, 8), float)
    if background == "on grass":
        scene += 10 * np.sin(2.1 * x + rng.uniform(0, 6))[..., None] * np.sin(0.9 * y)[..., None]
        scene[: height // 3] = _shade((170, 212, 242), rng, 6)
    elif background == "in the sea":
        scene += 12 * np.sin(1.2 * y + 0.5 * np.sin(0.5 * x) + rng.uniform(0, 6))[..., None]
    elif background == "on sand":
        scene += 6 * np.sin(0.5 * x + 0.9 * y + rng.uniform(0, 6))[..., None]
    else:
        speck = (235, 235, 200) if background == "at night" else (255, 255, 255)
        num_specks = 10 * width * height // SIZE**2
        scene[tuple(rng.integers(0, ((height,), (width,)), (2, num_specks)))] = speck
        if background == "in the snow":
            scene[: height // 3] -= 25
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def subject_images(n: int, seed: int) -> list[Image.Image]:
    """n pictures of the subject, the backgrounds in turn."""
    rng, backgrounds = np.random.default_rng(seed), list(BACKGROUNDS)
    return [draw(subject(backgrounds[i % len(backgrounds)]), rng) for i in range(n)]
