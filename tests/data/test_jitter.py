"""Jitter shows parts of a crop in other colors, within its bounds, and without it nothing
changes."""

import random
from dataclasses import replace
from functools import partial
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared.pictures import data
from trainers.config import DreamBoothConfig
from trainers.data.buckets import Bucket, enlargement
from trainers.data.crops import PLAIN, Crop, Jitter, choose_crop
from trainers.data.dreambooth_batches import held_out_batches
from trainers.data.pictures import Picture
from trainers.data.rng import derive_seed

SIZE = (48, 32)
PICTURES = [Picture(f"{i}", partial(str.encode, f"{i}"), "") for i in range(300)]
BOTH = data(crop_jitter=0.3, color_jitter=0.2, cache_variants=3)


def noise(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chosen(config, variant=0):
    return [choose_crop(picture, variant, SIZE, config) for picture in PICTURES]


def test_without_jitter_every_view_is_as_it_was():
    assert chosen(data()) == [Crop(*SIZE)] * 300
    for picture in PICTURES:
        r = random.Random(derive_seed(picture.digest, 0))
        crop = Crop(*SIZE, r.random(), r.random(), r.random() < 0.5, PLAIN)
        assert choose_crop(picture, 0, SIZE, data(random_flip=True, center_crop=False)) == crop
    image = noise((70, 40))
    for crop in (Crop(*SIZE), Crop(*SIZE, 0.3, 0.9, flip=True)):
        resized = image.resize((56, 32), Image.Resampling.LANCZOS)
        left = round(crop.left * 8)
        pixels = torch.from_numpy(np.array(resized.crop((left, 0, left + 48, 32))))
        plain = pixels.permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(crop(image), plain.flip(2) if crop.flip else plain)


def test_jitter_depends_on_content_and_variant_and_leaves_place_and_flip():
    varied = BOTH.model_copy(update={"random_flip": True, "center_crop": False})
    first = chosen(varied)
    assert first == chosen(varied)
    assert len(set(first) | set(chosen(varied, 1))) == 600
    renamed = Picture("other name", PICTURES[7].read, "other caption")
    assert choose_crop(renamed, 0, SIZE, varied) == first[7]
    plain = chosen(data(random_flip=True, center_crop=False))
    assert [replace(crop, jitter=PLAIN) for crop in first] == plain
    without = varied.model_copy(update={"color_jitter": 0.0})
    assert [c.jitter.share for c in chosen(without)] == [c.jitter.share for c in first]


@pytest.mark.parametrize(("crop", "color"), [(0.3, 0.2), (0.1, 0.0), (0.0, 0.05)])
def test_factors_fill_their_bounds_and_never_leave_them(crop, color):
    jitters = [view.jitter for view in chosen(data(crop_jitter=crop, color_jitter=color))]
    shares = [jitter.share for jitter in jitters]
    assert 1 - crop <= min(shares) <= max(shares) <= 1
    # uniform: the mean of 300 within five standard errors
    assert abs(mean(shares) - 1 + crop / 2) <= 5 * crop / (12 * 300) ** 0.5
    for name in ("brightness", "contrast", "saturation"):
        factors = [getattr(jitter, name) for jitter in jitters]
        assert 1 - color <= min(factors) <= max(factors) <= 1 + color
        assert abs(mean(factors) - 1) <= 5 * 2 * color / (12 * 300) ** 0.5


@pytest.mark.parametrize("picture", [(300, 200), (200, 300), (900, 100), (48, 32), (30, 20)])
def test_the_part_lies_in_the_crop_and_is_not_distorted(picture):
    """Where it is told to be, within the rounding to whole pixels."""
    for crop in chosen(BOTH.model_copy(update={"center_crop": False})):
        (whole, (left, top)), (part, (inner_left, inner_top)) = (
            view.box(picture) for view in (replace(crop, jitter=PLAIN), crop)
        )
        scale = enlargement(picture, SIZE) / crop.jitter.share
        assert all(abs(part[i] - scale * picture[i]) <= 0.5 for i in range(2))
        for axis, side, outer, inner, place in (
            (0, crop.width, left, inner_left, crop.jitter.left),
            (1, crop.height, top, inner_top, crop.jitter.top),
        ):
            assert 0 <= inner <= part[axis] - side
            shown = side * whole[axis] / part[axis]
            begin = inner * whole[axis] / part[axis]
            assert abs(begin - outer - place * (side - shown)) <= 1.5


def test_colors_change_as_they_are_told_and_places_do_not():
    image = noise(SIZE)
    gray = image.convert("L").convert("RGB")

    def pixels(picture, **factors):
        crop = Crop(*SIZE, jitter=Jitter(**factors))
        # masks are cut alike and have no colors
        assert crop.cut(picture).tobytes() == Crop(*SIZE).cut(picture).tobytes()
        return (crop(picture) + 1) * 127.5

    before = pixels(image)
    assert (pixels(image, brightness=0.9) - 0.9 * before).abs().max() <= 1
    contrast = pixels(image, contrast=0.8)
    middle = round(np.asarray(image.convert("L")).mean())
    assert (contrast - (middle + 0.8 * (before - middle))).abs().max() <= 1.5
    luma = torch.from_numpy(np.array(image.convert("L"))).float()
    saturated = pixels(image, saturation=0.8)
    assert (saturated - (luma + 0.8 * (before - luma))).abs().max() <= 1
    assert torch.equal(pixels(gray, saturation=1.2), pixels(gray))


def test_held_out_pictures_are_measured_as_they_are():
    buckets = [Bucket(SIZE, (tuple(PICTURES[:2]),))]
    held_out = held_out_batches(buckets, None, DreamBoothConfig(data=BOTH), "cpu")
    views = [crop for part in held_out for _, crop in part.crops()]
    assert views == [Crop(*SIZE)] * 2
