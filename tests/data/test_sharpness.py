"""Blur is measured in pixels, by the sharpest edges, whatever else a picture shows."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from tests.shared.messy_folder import scene
from trainers.data.sharpness import BLURRED, SIDE, edge_blur, to_measured_size

SIZE = (400, 300)


def gray(image):
    return image.convert("L")


def blurred(image, sigma):
    """By a Gaussian, without Pillow's approximation."""
    pixels = ndimage.gaussian_filter(np.asarray(gray(image), float), sigma)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sigma", [1, 1.5, 2, 3])
def test_the_blur_of_a_blurred_picture_is_found_in_pixels(seed, sigma):
    # the filters before and after it are whole numbers and not quite Gaussian
    assert edge_blur(blurred(scene(seed, SIZE), sigma)) == pytest.approx(sigma, rel=0.2, abs=0.35)


@pytest.mark.parametrize("seed", range(4))
def test_neither_contrast_nor_noise_nor_a_blurred_background_makes_a_picture_blurred(seed):
    image = gray(scene(seed, SIZE))
    pale = image.point(lambda value: 100 + value // 8)
    random = np.random.default_rng(seed)
    noisy = np.asarray(image, float) + random.normal(0, 6, image.size[::-1])
    background = image.filter(ImageFilter.GaussianBlur(8))
    background.paste(gray(scene(50 + seed, (160, 120))), (120, 90))
    for other in (image, pale, Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), background):
        assert edge_blur(other) < 0.6 * BLURRED


@pytest.mark.parametrize("seed", range(4))
def test_noise_does_not_make_a_blurred_picture_sharp(seed):
    random = np.random.default_rng(seed)
    pixels = np.asarray(blurred(scene(seed, SIZE), 3), float) + random.normal(0, 4, SIZE[::-1])
    assert edge_blur(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))) > BLURRED


@pytest.mark.parametrize("axis", [0, 1])
def test_a_picture_that_was_shaken_is_blurred_though_it_is_sharp_across(axis):
    moved = ndimage.uniform_filter1d(np.asarray(gray(scene(1, SIZE)), float), 12, axis=axis)
    assert edge_blur(Image.fromarray(moved.astype(np.uint8))) > BLURRED


def test_a_shade_along_sharp_lines_is_no_blur():
    across = np.where(np.arange(200) // 20 % 2, 200, 40)
    shade = np.linspace(-30, 30, 300)[:, None]
    assert edge_blur(Image.fromarray((across + shade).astype(np.uint8))) < BLURRED / 2


def test_what_was_enlarged_is_blurred_and_what_was_made_smaller_is_sharp():
    image = scene(2, (3 * SIDE, 2 * SIDE)).filter(ImageFilter.GaussianBlur(2))
    assert edge_blur(to_measured_size(image)) < BLURRED
    enlarged = scene(2, (90, 60)).resize((900, 600), Image.Resampling.BICUBIC)
    assert edge_blur(to_measured_size(enlarged)) > BLURRED


@pytest.mark.parametrize("size", [(3000, 700), (700, 3000), (512, 512), (100, 80)])
def test_the_measured_size_has_a_short_side_of_the_limit_or_less(size):
    measured = to_measured_size(Image.new("RGB", size))
    assert measured.mode == "L"
    assert min(measured.size) == min(SIDE, *size)
    assert measured.width / measured.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_nothing_is_said_of_pictures_that_are_plain_or_too_small():
    assert edge_blur(Image.new("L", (200, 200), 90)) is None
    assert edge_blur(gray(scene(0, (63, 200)))) is None
    assert edge_blur(gray(scene(0, (64, 200)))) is not None
