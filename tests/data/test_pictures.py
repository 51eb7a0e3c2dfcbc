"""Pictures decode as viewers show them, and one that is broken is named."""

from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from tests.shared.pictures import GREY, data, decoded
from trainers.data.photo_sets import load_class_pictures, load_instance_pictures
from trainers.errors import UserError


def test_pictures_of_every_format_are_read_in_the_order_of_their_names(put, tmp_path):
    names = ["a.png", "b.bmp", "c.webp", "d.jpg", "e.JPEG"]
    for name in reversed(names):
        put(name)
    put(".hidden.png")
    put("f.psd", b"a format that is not read")
    put("notes.md", b"not a picture")
    assert [p.name for p in load_instance_pictures(data(tmp_path))] == [
        str(tmp_path / name) for name in names
    ]


STORED_AS = {  # orientation tag -> how an upright picture is stored under it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("tag", STORED_AS)
def test_a_turned_picture_is_upright(put, tag):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 3, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = tag
    stored = upright if STORED_AS[tag] is None else upright.transpose(STORED_AS[tag])
    assert np.array_equal(decoded(put("turned.png", stored, exif=exif)), upright)


def test_what_is_transparent_is_white(put):
    color, alpha = np.random.default_rng(0).integers(0, 255, (2, 8, 8), dtype=np.uint8)
    rgba = np.dstack([color, color // 2, 255 - color, alpha])
    share = alpha[..., None] / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    assert np.abs(decoded(put("clear.png", Image.fromarray(rgba, "RGBA"))) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_transparent_shade_or_palette_entry_is_white(put, mode):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="L")
    if mode == "P":
        image = image.convert("P")
        image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2])
    shades = np.asarray(decoded(put("clear.png", image, transparency=1)))
    assert shades.tolist() == [[[0] * 3, [255] * 3, [2] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_shows_the_same_grey(put, mode):
    gray = GREY // 128 * 255 if mode == "1" else GREY
    image = (
        Image.fromarray(gray.astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(gray).convert(mode)
    )
    path = put("grey.jpg", image, quality=100) if mode == "CMYK" else put("grey.png", image)
    with Image.open(path) as stored:
        assert stored.mode == mode
    picture = decoded(path)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, int) - gray[..., None]).max() <= (4 if mode == "CMYK" else 0)


BROKEN = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"<html>not found</html>",
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut at the start": lambda whole: whole[:20],
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp"])
def test_a_broken_picture_is_named(put, tmp_path, name, damage):
    put("whole.png")
    put(name, damage(put(name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} is not a readable picture"):
        load_instance_pictures(data(tmp_path))
    with pytest.warns(UserWarning, match=f"skipped: .*{name}"):
        (left,) = load_instance_pictures(data(tmp_path, skip_corrupt=True))
    assert left.name.endswith("whole.png")


def test_a_malformed_exif_tag_neither_crashes_nor_turns_the_picture_wrong(put):
    exif = Image.Exif()
    exif[0x112], exif[0x131] = 6, "camera"
    text_as_resolution = exif.tobytes().replace(b"\x01\x31\x00\x02", b"\x01\x1a\x00\x02")
    path = put("camera.jpg", Image.new("RGB", (4, 2)), exif=text_as_resolution)
    with suppress(UserError):
        assert decoded(path).size == (2, 4)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("names", [[], ["broken.png"]], ids=["empty", "all skipped"])
def test_a_folder_without_pictures_is_named(put, tmp_path, names):
    for name in names:
        put(name, b"")
    reason = ": none of its 1 pictures can be read" if names else " holds no pictures"
    with pytest.raises(UserError, match=f"{tmp_path}{reason}"):
        load_instance_pictures(data(tmp_path, skip_corrupt=True))


def test_class_pictures_are_as_many_as_wanted_and_have_the_class_prompt(photos):
    config = data(class_prompt="a dog", num_class_images=3)
    pictures = load_class_pictures(photos, config.sets[0], config)
    assert [(p.name, p.caption) for p in pictures] == [
        (str(photos / f"{i}.png"), "a dog") for i in range(3)
    ]


def test_a_class_picture_keeps_its_own_caption(put):
    put("0.png"), put("1.png"), put("1.txt", b"a red dog")
    config = data(class_prompt=["a dog", "a cat"], num_class_images=9)
    pictures = load_class_pictures(put("2.png").parent, config.sets[0], config)
    assert [p.caption for p in pictures] == ["a dog", "a red dog", "a dog"]
