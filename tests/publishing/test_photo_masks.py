"""The page of photos shows what a mask leaves out."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.shared.messy_folder import scene
from trainers.data.inspection import share_masked_in
from trainers.data.pictures import picture_from_file
from trainers.publishing.photo_page import embed_photo


def test_a_veil_lies_on_what_the_mask_of_a_photo_leaves_out(tmp_path):
    scene(1).save(tmp_path / "1.png")
    mask = Image.new("L", scene(1).size)
    mask.paste(255, (0, 0, mask.width // 4, mask.height))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/1.png")
    photo = picture_from_file(tmp_path / "1.png")
    masked = replace(photo, mask=picture_from_file(tmp_path / "masks/1.png"))
    assert share_masked_in(masked) == pytest.approx(0.25, abs=0.02)
    assert share_masked_in(photo) is None
    plain, veiled = (decode_embedded(embed_photo(p)) for p in (photo, masked))
    third = plain.shape[1] // 5
    # within the mask the photo is as it is, up to the compression of the page's pictures
    assert np.abs(plain[:, :third] - veiled[:, :third]).mean() < 6
    assert np.abs(plain[:, 2 * third :] - veiled[:, 2 * third :]).mean() > 30


def decode_embedded(picture):
    with Image.open(io.BytesIO(base64.b64decode(picture.base64))) as image:
        return np.asarray(image.convert("RGB")).astype(int)
