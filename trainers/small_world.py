"""The small world: drawn 32 px objects with captions, a judge that reads them, and the figures of what a LoRA learned.

A base is trained on plain objects only. The subject of the quickstart, a purple and yellow striped star with a face, is
therefore new in every way but its shape: no stripes, no faces, no second colours. The judge has seen them all and never
gives a training signal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets" / "small_world"
SIZE = 32
CLASSES = ("ball", "box", "star", "heart", "house", "fish")
COLOURS = {
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
SAMPLING_STEPS, GUIDANCE = 12, 2.0

# The gate: figure -> (least, most) that passes. A LoRA trained with prior preservation must meet PRIOR; one trained
# without it must meet CONTRAST, which shows that it is the prior that preserves.
LEARN = {"loss_ratio": (0.0, 0.85), "cosine_gain": (0.35, 2.0), "attributes": (0.45, 1.0)}
PRIOR = {"leak": (0.0, 0.25), "class_star": (0.75, 1.0), "drift": (0.0, 0.60)}
CONTRAST = {"leak": (0.75, 1.0), "drift": (0.80, 2.0)}


@dataclass(frozen=True)
class Thing:
    """What one picture shows; `colour2` is empty where the pattern is plain."""

    shape: str
    colour: str
    background: str
    pattern: str = "plain"
    colour2: str = ""
    face: bool = False

    def labels(self) -> tuple[int, ...]:
        """Indices in the order of `Judge.HEADS`; without a second colour it counts as the first."""
        colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
        colour, colour2 = colours.index(self.colour), colours.index(self.colour2 or self.colour)
        background, pattern = backgrounds.index(self.background), PATTERNS.index(self.pattern)
        return CLASSES.index(self.shape), colour, background, pattern, colour2, int(self.face)


def subject(background: str) -> Thing:
    return Thing("star", "purple", background, "stripes", "yellow", face=True)


def plain_thing(rng: np.random.Generator) -> Thing:
    """What the base is trained on: one colour, no pattern, no face."""
    return Thing(*(_pick(names, rng) for names in (CLASSES, COLOURS, BACKGROUNDS)))


def rich_thing(rng: np.random.Generator) -> Thing:
    """What the judge and the autoencoder are trained on: any pattern, with or without a face."""
    thing, pattern = plain_thing(rng), _pick(PATTERNS, rng)
    colour2 = "" if pattern == "plain" else _pick([name for name in COLOURS if name != thing.colour], rng)
    return replace(thing, pattern=pattern, colour2=colour2, face=bool(rng.random() < 0.5))


def is_subject(thing: Thing) -> bool:
    """The subject's shape, pattern and pair of colours, in either order and with or without its face."""
    colours = {thing.colour, thing.colour2}
    return thing.shape == "star" and thing.pattern == "stripes" and colours == {"purple", "yellow"}


def caption(thing: Thing, rng: np.random.Generator) -> str:
    """Reads "a photo of a [xyz] [colour] shape [background]", the brackets sometimes left out.

    xyz is a nonsense word, never the placeholder: from it a base learns to read past a word that it does not know.
    """
    nonsense = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3))
    words = ["a photo of a"]
    if rng.random() < 0.2 and nonsense != PLACEHOLDER:
        words.append(nonsense)
    if rng.random() < 0.75:
        words.append(thing.colour)
    words.append(thing.shape)
    if rng.random() < 0.7:
        words.append(thing.background)
    return " ".join(words)


def draw(thing: Thing, rng: np.random.Generator, jitter: float = 0.35) -> Image.Image:
    """A SIZE x SIZE RGB picture; `jitter` scales the spread of place, size and angle (1: a quarter of the object)."""
    canvas = SIZE * 4
    radius = canvas * (0.32 + jitter * rng.uniform(-0.05, 0.03))
    centre = canvas / 2 + canvas * jitter * rng.uniform(-0.1, 0.1, 2)
    angle = math.radians(jitter * rng.uniform(-15, 15))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def place(points) -> list[tuple[float, float]]:
        """Object coordinates (the object's radius is 1, y points down) -> canvas pixels."""
        return [tuple(xy) for xy in centre + radius * np.asarray(points, float) @ turn.T]

    def disc(x, y, r) -> list[float]:
        ((x, y),) = place([(x, y)])
        return [x - r * radius, y - r * radius, x + r * radius, y + r * radius]

    colour, colour2 = (_shade(COLOURS[name], rng, 12) for name in (thing.colour, thing.colour2 or thing.colour))
    paint = Image.new("RGB", (canvas, canvas), colour)
    brush = ImageDraw.Draw(paint)
    if thing.pattern == "stripes":
        for y in np.arange(-3.2, 3.3, 0.8):
            brush.polygon(place([(-4, y - 0.2), (4, y - 0.2), (4, y + 0.2), (-4, y + 0.2)]), fill=colour2)
    elif thing.pattern == "dots":
        for i in range(-2, 3):
            for j in range(-2, 3):
                brush.ellipse(disc(0.55 * (i + 0.5 * (j % 2)), 0.55 * j, 0.17), fill=colour2)
    elif thing.pattern == "halves":
        brush.polygon(place([(0, -4), (4, -4), (4, 4), (0, 4)]), fill=colour2)
    if thing.face:
        for x in (-0.3, 0.3):
            brush.ellipse(disc(x, -0.1, 0.22), fill=(255, 255, 255))
            brush.ellipse(disc(x, -0.1, 0.11), fill=(0, 0, 0))
        brush.chord(disc(0, 0.27, 0.28), 0, 180, fill=(200, 20, 40))

    mask = Image.new("L", (canvas, canvas))
    for polygon in _outline(thing.shape):
        ImageDraw.Draw(mask).polygon(place(polygon), fill=255)
    picture = _scenery(thing.background, rng).resize((canvas, canvas), Image.Resampling.BICUBIC)
    picture.paste(tuple(int(0.45 * c) for c in colour), mask=mask.filter(ImageFilter.MaxFilter(5)))
    picture.paste(paint, mask=mask)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _pick(names, rng: np.random.Generator) -> str:
    return list(names)[rng.integers(len(names))]


def _shade(colour: tuple[int, int, int], rng: np.random.Generator, spread: float) -> tuple[int, int, int]:
    return tuple(int(c) for c in np.clip(colour + rng.uniform(-spread, spread, 3), 0, 255))


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


def _scenery(background: str, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    scene = np.full((SIZE, SIZE, 3), _shade(BACKGROUNDS[background], rng, 8), float)
    if background == "on grass":
        scene += 10 * np.sin(2.1 * x + rng.uniform(0, 6))[..., None] * np.sin(0.9 * y)[..., None]
        scene[: SIZE // 3] = _shade((170, 212, 242), rng, 6)
    elif background == "in the sea":
        scene += 12 * np.sin(1.2 * y + 0.5 * np.sin(0.5 * x) + rng.uniform(0, 6))[..., None]
    elif background == "on sand":
        scene += 6 * np.sin(0.5 * x + 0.9 * y + rng.uniform(0, 6))[..., None]
    else:
        speck = (235, 235, 200) if background == "at night" else (255, 255, 255)
        scene[tuple(rng.integers(0, SIZE, (2, 10)))] = speck
        if background == "in the snow":
            scene[: SIZE // 3] -= 25
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def subject_images(n: int, seed: int) -> list[Image.Image]:
    """n pictures of the subject, the backgrounds in turn."""
    rng, backgrounds = np.random.default_rng(seed), list(BACKGROUNDS)
    return [draw(subject(backgrounds[i % len(backgrounds)]), rng) for i in range(n)]


class Judge(ModelMixin, ConfigMixin):
    """Reads a picture: one linear head per attribute on a common feature vector, which also serves for cosines.

    `centre` (features,) is the mean feature of real pictures, subtracted before a cosine is taken.
    """

    HEADS = (
        ("shape", len(CLASSES)),
        ("colour", len(COLOURS)),
        ("background", len(BACKGROUNDS)),
        ("pattern", len(PATTERNS)),
        ("colour2", len(COLOURS)),
        ("face", 2),
    )

    @register_to_config
    def __init__(self, width: int = 24, features: int = 96):
        super().__init__()
        layers = []
        for c, d in pairwise((3, width, 2 * width, 4 * width)):
            layers += [nn.Conv2d(c, d, 3, padding=1, bias=False), nn.BatchNorm2d(d), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * (SIZE // 8) ** 2, features), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(features, values) for name, values in self.HEADS})
        self.register_buffer("centre", torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """x (B, 3, SIZE, SIZE) in -1..1 -> logits per head (B, values), features (B, features)."""
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}, features

    @torch.no_grad()
    def read(self, pictures: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        """-> the index read off by each head (B,), centred unit features (B, features)."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        logits, features = self(pixels.to(self.device, self.dtype) / 127.5 - 1)
        return {name: values.argmax(1) for name, values in logits.items()}, F.normalize(features - self.centre, dim=1)


@dataclass(frozen=True)
class Measurement:
    """`figures` by name, the `pictures` they were read from by row, and the features of the class row (n, features)."""

    figures: dict[str, float]
    pictures: dict[str, list[Image.Image]]
    class_features: Tensor


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """One picture per prompt. Each has a generator of its own, so that a picture does not depend on its neighbours."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    return pipeline(prompts, SIZE, SIZE, SAMPLING_STEPS, guidance_scale=GUIDANCE, generator=generators).images


def measure(
    pipeline: StableDiffusionPipeline, judge: Judge, base: Measurement | None = None, n: int = 24, seed: int = 0
) -> Measurement:
    """Samples four rows of n pictures and lets the judge read them. All figures but two are rates, 0..1:

    `star`, `colours`, `stripes`, `face`, their mean `attributes`: of the subject, asked for by the instance prompt.
    `cosine`: mean cosine of those pictures to 20 held-out pictures of the subject; `cosine_gain`: over the base's.
    `edit`: the background that was asked for together with the subject; `edit_attributes`: what is left of the subject.
    `leak`: stripes or a face under the class prompt; `class_star`: a star there; `drift`: how far the mean unit feature
    moved from the base's (0..2; without `base` this and the gain are 0).
    `other_shape`, `other_colour`, `other_background`: plain objects of the other classes, as captioned.
    """
    rng, shapes = np.random.default_rng(seed), [name for name in CLASSES if name != "star"]
    others = [replace(plain_thing(rng), shape=_pick(shapes, rng)) for _ in range(n)]
    places = [list(BACKGROUNDS)[i % len(BACKGROUNDS)] for i in range(n)]
    rows = {
        "subject": [INSTANCE_PROMPT] * n,
        "edit": [f"{INSTANCE_PROMPT} {place}" for place in places],
        "class": [CLASS_PROMPT] * n,
        "other": [f"a photo of a {thing.colour} {thing.shape} {thing.background}" for thing in others],
    }
    pictures = {row: sample(pipeline, prompts, seed + i) for i, (row, prompts) in enumerate(rows.items())}
    read = {row: judge.read(images) for row, images in pictures.items()}

    labels, features = read["subject"]
    figures = subject_figures(labels)
    figures["cosine"] = float((features @ judge.read(subject_images(20, HELD_OUT_SEED))[1].T).mean())
    figures["cosine_gain"] = figures["cosine"] - base.figures["cosine"] if base else 0.0
    asked = torch.tensor([subject(place).labels()[2] for place in places])
    figures["edit"] = _rate(read["edit"][0]["background"] == asked)
    figures["edit_attributes"] = subject_figures(read["edit"][0])["attributes"]
    labels, features = read["class"]
    figures["leak"] = _rate((labels["pattern"] == PATTERNS.index("stripes")) | (labels["face"] == 1))
    figures["class_star"] = _rate(labels["shape"] == CLASSES.index("star"))
    figures["drift"] = float((features.mean(0) - base.class_features.mean(0)).norm()) if base else 0.0
    wanted = torch.tensor([thing.labels() for thing in others])
    for i, name in enumerate(("shape", "colour", "background")):
        figures[f"other_{name}"] = _rate(read["other"][0][name] == wanted[:, i])
    return Measurement(figures, pictures, features)


def subject_figures(labels: Mapping[str, Tensor]) -> dict[str, float]:
    """The judge's indices (B,) per head -> rates of the subject's four attributes, and their mean."""
    star, purple, _, stripes, yellow, _ = subject("on sand").labels()
    pair = torch.stack([labels["colour"], labels["colour2"]]).sort(0).values
    figures = {
        "star": _rate(labels["shape"] == star),
        "colours": _rate((pair == torch.tensor(sorted((purple, yellow)))[:, None]).all(0)),
        "stripes": _rate(labels["pattern"] == stripes),
        "face": _rate(labels["face"] == 1),
    }
    return figures | {"attributes": sum(figures.values()) / len(figures)}


def _rate(hits: Tensor) -> float:
    return float(hits.float().mean())


def gate(figures: Mapping[str, float], prior: bool = True) -> dict[str, bool]:
    """Which lines of the gate pass; `figures` are `measure`'s plus `loss_ratio`, the hold-out loss over the base's."""
    limits = LEARN | (PRIOR if prior else CONTRAST)
    return {name: least <= figures[name] <= most for name, (least, most) in limits.items()}


def before_after_grid(base: Measurement, tuned: Measurement, columns: int = 8, scale: int = 4) -> Image.Image:
    """A labelled sheet: the training pictures, then each row of the base above the same seeds with the LoRA."""
    rows = {"training pictures": subject_images(5, TRAINING_SEED)}
    titles = (INSTANCE_PROMPT, "... and a background", CLASS_PROMPT, "other classes")
    for row, title in zip(base.pictures, titles, strict=True):
        rows |= {f"{title}\nbase": base.pictures[row], f"{title}\nLoRA": tuned.pictures[row]}
    tile, margin = SIZE * scale, 230
    sheet = Image.new("RGB", (margin + columns * (tile + 4), len(rows) * (tile + 4)), "white")
    font = ImageFont.load_default(18)
    for y, (title, pictures) in enumerate(rows.items()):
        top = y * (tile + 4)
        ImageDraw.Draw(sheet).multiline_text((8, top + tile // 3), title, fill="black", font=font)
        for x, picture in enumerate(pictures[:columns]):
            sheet.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), (margin + x * (tile + 4), top))
    return sheet
