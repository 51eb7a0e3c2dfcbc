"""Two subjects of the small world, and what of each is seen in pictures of the other."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .measure import rate
from .world import CLASSES, COLORS, PATTERNS, Thing, subject

WORDS = {"star": "sks", "heart": "zwx"}
# the other half of the class pictures keeps places, colors and classes, see docs/small_world.md
OTHERS = ("a red ball at night", "a blue house on sand", "a green fish in the sea")
LEARNT, BLEEDS = 0.75, 0.25  # the least of a subject's own, and the most of another's


def thing(shape: str, background: str) -> Thing:
    if shape == "star":
        return subject(background)
    return Thing("heart", "blue", background, "dots", "white")


def make_prompts() -> dict[str, str]:
    """By the name of a row: the subjects, their classes, and the words exchanged."""
    star, heart = (f"a photo of a {word} {shape}" for shape, word in WORDS.items())
    return {
        "sks star": star,
        "zwx heart": heart,
        "star": "a photo of a star",
        "heart": "a photo of a heart",
        "sks heart": f"a photo of a {WORDS['star']} heart",
        "zwx star": f"a photo of a {WORDS['heart']} star",
    }


def read_marks(labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Rates among pictures: of each subject's shape, its pattern and its two colors; of faces."""
    pair = torch.stack([labels["colour"], labels["colour2"]]).sort(0).values
    figures = {}
    for shape in WORDS:
        own = thing(shape, "on sand")
        colors = sorted(list(COLORS).index(color) for color in (own.color, own.color2))
        has_pattern = rate(labels["pattern"] == PATTERNS.index(own.pattern))
        has_colors = rate((pair == torch.tensor(colors)[:, None]).all(0))
        figures[shape] = rate(labels["shape"] == CLASSES.index(shape))
        figures[f"{shape}'s pattern"] = has_pattern
        figures[f"{shape}'s colors"] = has_colors
    return figures | {"face": rate(labels["face"] == 1)}


def verdict(name: str, figures: Mapping[str, float], shapes: Sequence[str]) -> str:
    """Whether a subject is learnt and free of the other, and a class is left alone."""
    word, _, shape = name.rpartition(" ")
    if word and word != WORDS[shape]:
        return ""  # exchanged words have no right answer
    marks = {owner: figures[f"{owner}'s pattern"] for owner in WORDS}
    bleeding = {**marks, "star": max(marks["star"], figures["face"])}
    other = max(rate for owner, rate in bleeding.items() if owner != shape or not word)
    is_apart = other <= BLEEDS and figures[shape] >= LEARNT
    if word and shape in shapes:
        own = figures[f"{shape}'s colors"], figures["face"] if shape == "star" else 1.0
        is_learnt = min(marks[shape], *own) >= LEARNT
        return "learnt and apart" if is_learnt and is_apart else "FAILED"
    return "kept" if is_apart else "FAILED"
