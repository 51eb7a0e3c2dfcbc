"""A view is what diffusers' preprocessing gives, or a part of the resized picture."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from tests.shared.pictures import decoded
from trainers.data.crops import Crop


def test_the_centre_view_equals_diffusers_preprocessing(photos):
    for path in photos.iterdir():
        image = decoded(path).resize((48, 32))
        theirs = VaeImageProcessor().preprocess(image, 16, 16, resize_mode="crop")[0]
        torch.testing.assert_close(Crop(16, 16)(image), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (24, 24), (200, 24), (7, 9)])
@pytest.mark.parametrize(("left", "top"), [(0, 0), (0.5, 0.5), (1, 1), (0.3, 0.9)])
def test_any_view_is_a_square_inside_the_resized_picture(size, left, top):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )
    pixels = Crop(24, 24, left, top)(image)
    assert pixels.shape == (3, 24, 24)
    assert -1 <= pixels.min() < pixels.max() <= 1
    if min(size) == 24:  # nothing to resize: the view is a cut
        x, y = round(left * (size[0] - 24)), round(top * (size[1] - 24))
        cut = np.asarray(image)[y : y + 24, x : x + 24]
        assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0), cut)


def test_black_and_white_are_the_ends_of_the_range():
    pixels = Crop.square(2)(
        Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("RGB")
    )
    assert pixels.tolist() == [[[-1, 1], [1, -1]]] * 3


def test_a_flip_mirrors_the_same_cut(photos):
    image = decoded(photos / "0.png")
    torch.testing.assert_close(
        Crop(16, 16, 0.2, 0.7, flip=True)(image), Crop(16, 16, 0.2, 0.7)(image).flip(2)
    )
