"""A mask means the same however its file stores it, and lies on its picture."""

import io

import numpy as np
import pytest
from PIL import Image

from trainers.config import PairsConfig
from trainers.data import decoding
from trainers.data.decoding import TURNS
from trainers.data.pictures import Picture
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images
from trainers.from_scratch.masks import read_mask


def picture_of(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return Picture("some/mask.png", buffer.getvalue, "")


DISC = np.zeros((48, 72), bool)
DISC[8:24, 8:56] = True


@pytest.mark.parametrize(("black", "white"), [(0, 1), (1, 0)])
def test_a_mask_of_two_grays_in_a_palette_is_read_by_its_grays(black, white):
    image = Image.fromarray(np.where(DISC, white, black).astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255 * (index == white) for index in range(2) for _ in range(3)])
    assert np.array_equal(np.asarray(read_mask(picture_of(image), 2)), DISC)


def test_a_palette_of_grays_that_are_no_classes_holds_indices():
    indices = np.random.default_rng(0).integers(0, 3, (6, 7)).astype(np.uint8)
    image = Image.frombytes("P", (7, 6), indices.tobytes())
    image.putpalette([level for level in (0, 128, 255) for _ in range(3)])
    assert np.array_equal(np.asarray(read_mask(picture_of(image), 3)), indices)


def test_a_mask_of_fractions_is_refused():
    image = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    with pytest.raises(UserError, match=r"has the value 0\.5"):
        read_mask(picture_of(image, "TIFF"), 2)


def pair(folder, orientation, mask_orientation, mask_as_stored, size=(72, 48)):
    """Save a bright disc and its mask; the picture turned under its tag, the mask as told."""
    upright = Image.fromarray(255 * DISC.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(inverse.get(orientation, TURNS[orientation]))
    for name, image, tag in (
        ("0_image", stored.convert("RGB"), orientation),
        ("0_mask", stored if mask_as_stored else upright, mask_orientation),
    ):
        exif = Image.Exif()
        exif[decoding.ORIENTATION_TAG] = tag
        image.save(folder / f"{name}.png", exif=exif)
    config = PairsConfig(image_dir=folder, resolution=72)
    return load_images(config, "cpu", read_target=lambda picture: read_mask(picture, 2))[0]


@pytest.mark.parametrize("orientation", TURNS)
def test_a_mask_is_turned_by_its_own_tag_as_its_picture_is(tmp_path, orientation):
    *picture, mask = pair(tmp_path, orientation, orientation, mask_as_stored=True)
    assert mask.sum() > 0
    assert ((picture[0] > 127) == (mask == 1)).float().mean() > 0.95


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("mask_as_stored", [True, False])
def test_a_mask_without_a_tag_lies_as_its_size_tells(tmp_path, orientation, mask_as_stored):
    *picture, mask = pair(tmp_path, orientation, 1, mask_as_stored)
    assert ((picture[0] > 127) == (mask == 1)).float().mean() > 0.95


@pytest.mark.parametrize(("orientation", "size"), [(2, (72, 48)), (3, (72, 48)), (6, (72, 72))])
def test_a_mask_without_a_tag_that_may_lie_either_way_is_refused(tmp_path, orientation, size):
    with pytest.raises(UserError, match=r"0_image\.png is turned by its EXIF tag"):
        pair(tmp_path, orientation, 1, mask_as_stored=False, size=size)
