"""A picture shows the same whatever it is stored as, and nothing but pictures is opened."""

import io
import os
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from trainers.config import DataConfig, ImagesConfig
from trainers.data import decoding
from trainers.data.folders import list_image_files
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.pictures import Picture, picture_from_file
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images

RANDOM = np.random.default_rng(0)
COLORS = Image.fromarray(RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8))


def load(folder, **keys):
    return load_instance_pictures(DataConfig(instance_data_dir=folder, instance_prompt="p", **keys))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture_of(image, format="PNG", **options):
    content = encoded(image, format, **options)
    return Picture(f"some/picture.{format.lower()}", lambda: content, "")


# Formats


@pytest.mark.parametrize("name", ["a.TIFF", "b.tif", "c.gif", "d.jfif", "e.avif", "f.JPEG"])
def test_what_pillow_reads_is_learnt_from_whatever_the_case_of_its_ending(tmp_path, name):
    if name.endswith("avif") and "AVIF" not in decoding.readable_formats():
        pytest.skip("this Pillow reads no AVIF")
    COLORS.save(tmp_path / "0.png")
    COLORS.convert("RGB").save(tmp_path / name, "JPEG" if name.endswith("jfif") else None)
    _, picture = load(tmp_path)
    assert picture.name.endswith(name)
    assert picture.decode().size == COLORS.size


def test_a_picture_may_have_the_ending_of_another_format(tmp_path):
    (tmp_path / "really_a.jpg").write_bytes(encoded(COLORS))
    assert load(tmp_path)[0].decode().tobytes() == COLORS.tobytes()


def test_of_an_animation_the_first_frame_is_read():
    moving = picture_of(COLORS, "WEBP", save_all=True, append_images=[COLORS.rotate(180)])
    assert moving.storage.has_more_frames
    first = picture_of(COLORS, "WEBP")
    assert np.abs(np.int16(moving.decode()) - np.int16(first.decode())).mean() < 3


def test_the_gain_map_behind_a_phones_jpeg_is_no_frame():
    stored = picture_of(COLORS, "MPO", save_all=True, append_images=[COLORS])
    assert not stored.storage.has_more_frames
    assert stored.decode().size == COLORS.size


def test_a_format_that_starts_other_programs_is_refused_under_any_name(tmp_path, monkeypatch):
    (tmp_path / "z.png").write_bytes(encoded(COLORS, "EPS"))

    def start(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(UserError, match=r"z\.png is not a readable picture .*none of JPEG"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_the_picture_of_an_iphone_names_the_package_that_reads_it(tmp_path, name, monkeypatch):
    monkeypatch.setattr(decoding, "readable_formats", lambda: ("JPEG", "PNG"))
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(UserError, match=rf"{name} is stored as HEIF.*pip install pillow-heif"):
        load(tmp_path)


# Files that are no files


def make_pipe(path):
    os.mkfifo(path)


def link_to_nothing(path):
    path.symlink_to(path.with_name("gone.jpg"))


def link_to_itself(path):
    path.symlink_to(path)


def link_to_an_endless_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "make", [make_pipe, link_to_nothing, link_to_itself, link_to_an_endless_device]
)
@pytest.mark.parametrize("name", ["x.jpg", "x.txt"])
def test_what_is_no_ordinary_file_is_named_and_never_opened(tmp_path, make, name):
    COLORS.save(tmp_path / ("x.png" if name == "x.txt" else "0.png"))
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} (is|cannot)"):
        load(tmp_path)


def test_a_file_that_does_not_end_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"x\.jpg is larger than 1024 MiB"):
        load(tmp_path)


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_a_small_file_of_far_too_many_pixels_is_one_message(tmp_path, side, recwarn):
    """Pillow itself warns below the one size and refuses from the other."""
    rows = zlib.compress(bytes(side // 8 + 1) * 10)
    header = encoded(Image.new("1", (8, 8)))
    start = header.index(b"IHDR") + 4
    sizes = side.to_bytes(4, "big") * 2 + header[start + 8 : start + 13]
    chunk = sizes + zlib.crc32(b"IHDR" + sizes).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(header[:start] + chunk + header[start + 17 :] + rows)
    with pytest.raises(UserError, match=r"x\.png .*more than 134 million pixels"):
        load(tmp_path)
    assert not recwarn.list


# Colors


def wide_gamut_profile():
    """A profile whose red, green and blue are beyond sRGB's, made of sRGB's own by exchanging the
    primaries' colors (those of Display P3, adapted to D50)."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    for entry in range(int.from_bytes(content[128:132], "big")):
        at = 132 + 12 * entry
        name, offset = bytes(content[at : at + 4]), int.from_bytes(content[at + 4 : at + 8], "big")
        for i, value in enumerate(primaries.get(name, ())):
            number = round(value * 65536).to_bytes(4, "big", signed=True)
            content[offset + 8 + 4 * i : offset + 12 + 4 * i] = number
    return bytes(content)


def p3_to_srgb(rgb):
    """sRGB levels of Display P3 levels (N, 3), by the matrices of the standards."""
    p3 = np.array([[0.4866, 0.2657, 0.1982], [0.2290, 0.6917, 0.0793], [0, 0.0451, 1.0439]])
    srgb = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    v = rgb / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    out = np.clip(linear @ p3.T @ np.linalg.inv(srgb).T, 0, 1)
    return 255 * np.where(out <= 0.0031308, 12.92 * out, 1.055 * out ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_display_p3_keeps_its_saturation(format, mode):
    if (format, mode) == ("JPEG", "RGBA"):
        pytest.skip("JPEG has no alpha")
    levels = np.array([[180, 90, 90], [90, 170, 100], [128, 128, 128], [100, 110, 190]])
    flat = np.repeat(levels.astype(np.uint8)[:, None], 64, 1).repeat(16, 0)
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0}
    if format not in ("WEBP", "JPEG"):
        options = {}
    image = Image.fromarray(flat).convert(mode)
    picture = picture_of(image, format, icc_profile=wide_gamut_profile(), **options)
    shown = np.asarray(picture.decode(), float)[8::16, 32]
    assert np.abs(shown - p3_to_srgb(levels)).max() < 3
    assert shown[0, 0] - shown[0, 1] > 100  # 90 where the profile is ignored


def test_the_profile_of_srgb_itself_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "L"):
        image = COLORS.convert(mode)
        shown = picture_of(image, icc_profile=profile).decode()
        assert shown.tobytes() == image.convert("RGB").tobytes(), mode


@pytest.mark.parametrize("profile", [b"junk", b"", wide_gamut_profile()[:200]])
def test_a_damaged_profile_is_ignored(profile):
    shown = picture_of(COLORS, icc_profile=profile).decode()
    assert shown.tobytes() == COLORS.tobytes()


def test_a_profile_of_another_kind_of_picture_is_ignored():
    image = COLORS.convert("CMYK")
    shown = picture_of(image, "TIFF", icc_profile=wide_gamut_profile()).decode()
    assert shown.tobytes() == image.convert("RGB").tobytes()


# Depth


def deep(top, **options):
    """A ramp of 16 bits up to `top`."""
    return Image.fromarray(np.linspace(0, top, 64 * 64).reshape(64, 64).astype(np.uint16))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_twelve_bits_in_a_file_of_sixteen_are_refused_with_the_key_that_reads_them(
    tmp_path, format
):
    suffix = format.lower()
    deep(900).save(tmp_path / f"dark.{suffix}")
    deep(4095).save(tmp_path / f"full.{suffix}")
    with pytest.raises(UserError, match=r"use 12 of them .*4095.*: set data.bit_depth=12"):
        load(tmp_path)
    dark, full = load(tmp_path, bit_depth=12)
    levels = np.asarray(full.decode())
    assert len(np.unique(levels)) == 256
    assert levels.max() == 255
    # one scale for the whole set
    assert np.asarray(dark.decode()).max() == 900 * 255 // 4095
    assert len({p.digest for p in (full, picture_from_file(tmp_path / f"full.{suffix}"))}) == 2


def test_sixteen_bits_are_read_as_before_and_more_than_was_said_is_refused(tmp_path):
    deep(65535).save(tmp_path / "x.png")
    (picture,) = load(tmp_path)
    assert np.array_equal(np.asarray(picture.decode())[..., 0], np.asarray(deep(65535)) // 257)
    with pytest.raises(UserError, match=r"x\.png holds values from 0 to 65535, and 12 bits"):
        load(tmp_path, bit_depth=12)


def test_a_dark_picture_of_sixteen_bits_is_read_once_that_is_said(tmp_path):
    deep(4095).save(tmp_path / "x.png")
    assert np.asarray(load(tmp_path, bit_depth=16)[0].decode()).max() == 15


def deep_colors(top):
    """A PNG of 16 bits per channel, which Pillow reads and cannot write."""
    gray = np.asarray(deep(top)).astype(">u2")
    rows = np.repeat(gray[..., None], 3, 2).reshape(64, -1).view(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in rows.reshape(64, -1))
    content = b"\x89PNG\r\n\x1a\n"
    header = (64).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")):
        content += len(data).to_bytes(4, "big") + name + data
        content += zlib.crc32(name + data).to_bytes(4, "big")
    return content


def test_colors_of_twelve_bits_are_refused_with_advice(tmp_path):
    (tmp_path / "x.png").write_bytes(deep_colors(65535))
    assert np.asarray(load(tmp_path)[0].decode()).max() == 255
    (tmp_path / "x.png").write_bytes(deep_colors(4095))
    for keys in ({}, {"bit_depth": 12}):
        with pytest.raises(UserError, match=r"x\.png have 16 bits .*save them with 8 bits"):
            load(tmp_path, **keys)


def test_numbers_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif holds floating-point numbers"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"x\.tif holds floating-point numbers"):
        load_images(ImagesConfig(image_dir=tmp_path), "cpu")


def test_a_deep_picture_whose_lowest_value_is_white_is_not_read_inverted():
    shown = picture_of(deep(65535), "TIFF", tiffinfo={262: 0}).decode()
    assert np.asarray(shown)[0, 0].tolist() == [255] * 3


def test_small_networks_refuse_and_read_depths_alike(tmp_path):
    deep(4095).save(tmp_path / "x.png")
    settings = {"image_dir": tmp_path, "resolution": 64}
    with pytest.raises(UserError, match=r"set data.bit_depth=12"):
        load_images(ImagesConfig(**settings), "cpu")
    images = load_images(ImagesConfig(**settings, bit_depth=12), "cpu")
    assert len(images[0].unique()) == 256


def test_every_ending_that_is_listed_belongs_to_a_format(tmp_path):
    for suffix in decoding.IMAGE_SUFFIXES:
        (tmp_path / f"x{suffix}").touch()
    assert len(list_image_files(tmp_path)) == len(decoding.IMAGE_SUFFIXES)
