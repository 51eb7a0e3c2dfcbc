"""A mask belongs to one picture and lies on it, however it is named, stored, turned and cropped."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.shared.pictures import data
from trainers.config import DataConfig
from trainers.data.crops import Crop
from trainers.data.file_outcomes import describe_files
from trainers.data.intake import Intake
from trainers.data.masks import check_masks, decode_mask, latent_mask
from trainers.data.photo_sets import load_held_out_pictures, load_instance_pictures
from trainers.errors import UserError

BLOCKS = np.kron(np.random.default_rng(0).integers(0, 2, (6, 9)), np.ones((4, 4)))  # 24 x 36
SPOT = (255 * BLOCKS).astype(np.uint8)


def save(path, array=SPOT, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def colored(array=SPOT):
    return np.stack([array, array, array], -1)


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def load(folder, intake=None, **keys):
    keys = {"mask_dir": folder / "masks"} | keys
    return load_instance_pictures(data(folder / "photos", **keys), intake)


# Which mask belongs to which picture


@pytest.mark.parametrize(
    "name", ["1.png", "1-masklabel.png", "1_mask.png", "1.jpg", "1-masklabel.webp"]
)
@pytest.mark.parametrize("place", ["", "sub/"])
def test_a_mask_has_the_name_of_its_picture_in_a_folder_of_its_own(tmp_path, name, place):
    save(tmp_path / "photos" / place / "1.jpg", colored())
    save(tmp_path / "masks" / place / name)
    (picture,) = load(tmp_path)
    assert picture.mask.name == str(tmp_path / "masks" / place / name)


@pytest.mark.parametrize("ending", ["-masklabel", "_mask"])
def test_a_mask_beside_its_picture_is_no_picture(tmp_path, ending):
    save(tmp_path / "photos/1.png", colored()), save(tmp_path / f"photos/1{ending}.png")
    intake = Intake()
    (picture,) = load(tmp_path, intake, mask_dir=tmp_path / "photos")
    assert picture.mask.name.endswith(f"1{ending}.png")
    outcomes = {file.name: file.outcome for file in describe_files(intake, {})}
    assert outcomes[f"1{ending}.png"] == "a mask"


def test_held_out_pictures_find_their_masks_by_the_same_rule(tmp_path):
    for name in ("photos/1.png", "held/2.png", "masks/1.png", "masks/2.png", "held/2_mask.png"):
        save(tmp_path / name, colored(SPOT if "masks" in name else SPOT + len(name)))
    config = data(tmp_path / "photos", held_out_dir=tmp_path / "held", mask_dir=tmp_path / "photos")
    (picture,) = load_held_out_pictures(config)
    assert picture.mask.name.endswith("held/2_mask.png")
    (tmp_path / "held/2_mask.png").unlink()
    intake = Intake()
    config = config.model_copy(update={"mask_dir": tmp_path / "masks"})
    (learnt,), (held_out,) = (
        read(config, intake) for read in (load_instance_pictures, load_held_out_pictures)
    )
    assert learnt.mask.name.endswith("masks/1.png")
    assert held_out.mask.name.endswith("masks/2.png")
    assert not any("without a picture" in note.text for note in intake.notes)


def test_two_masks_of_one_picture_are_an_error(tmp_path):
    save(tmp_path / "photos/1.jpg", colored())
    save(tmp_path / "masks/1.png"), save(tmp_path / "masks/1_mask.png")
    with pytest.raises(UserError, match=r"1\.jpg has two masks, 1\.png and 1_mask\.png"):
        load(tmp_path)


def test_masks_that_nobody_asked_for_are_named(tmp_path):
    save(tmp_path / "photos/1.png", colored()), save(tmp_path / "photos/1-masklabel.png")
    intake = Intake()
    assert len(load(tmp_path, intake, mask_dir=None)) == 2
    assert any("learnt as pictures: 1-masklabel.png" in note.text for note in intake.notes)


def test_a_mask_in_color_or_one_that_is_no_picture_is_named(tmp_path):
    save(tmp_path / "photos/1.png", colored())
    mask = save(tmp_path / "masks/1.png", colored() * np.uint8([1, 1, 0]))
    (picture,) = load(tmp_path)
    with pytest.raises(UserError, match=r"masks/1\.png is in color"):
        decode_mask(picture)
    mask.write_bytes(b"x")
    (picture,) = load(tmp_path)
    with pytest.raises(UserError, match=r"masks/1\.png is not a readable mask"):
        decode_mask(picture)
    # where all mistakes are to be told, it is one of them
    check_masks(intake := Intake(keeps_going=True), [picture], 0.1)
    assert str(tmp_path / "masks/1.png") in intake.left_out


# Where it lies


def mask_values(picture):
    return np.asarray(decode_mask(picture))


@pytest.mark.parametrize(
    "stored",
    [
        SPOT,
        SPOT.astype(bool),
        colored(),
        np.concatenate([colored(np.full_like(SPOT, 255)), SPOT[..., None]], -1),
        (SPOT.astype(np.uint16) * 257),
    ],
    ids=["gray", "bits", "rgb", "white on transparent", "16 bits"],
)
def test_a_mask_reads_the_same_however_it_is_stored(tmp_path, stored):
    save(tmp_path / "photos/1.png", colored()), save(tmp_path / "masks/1.png", stored)
    (picture,) = load(tmp_path)
    assert np.array_equal(mask_values(picture), SPOT)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("made_of", ["stored", "upright", "with its tag"])
def test_a_mask_is_turned_with_its_picture(tmp_path, orientation, made_of):
    """The mask is made of its picture's own content, which tells where it must lie."""
    save(tmp_path / "photos/1.png", colored(), exif=exif(orientation))
    (picture,) = load(tmp_path, mask_dir=None)
    upright = np.asarray(picture.decode())[..., 0]
    if made_of == "upright":
        save(tmp_path / "masks/1.png", np.ascontiguousarray(upright))
    else:
        tags = {"exif": exif(orientation)} if made_of == "with its tag" else {}
        save(tmp_path / "masks/1.png", **tags)
    (picture,) = load(tmp_path)
    assert np.array_equal(mask_values(picture), upright)


def test_the_alpha_channel_is_a_mask_unless_a_file_is(tmp_path):
    rgba = np.concatenate([colored(255 - SPOT), SPOT[..., None]], -1)
    save(tmp_path / "photos/1.png", rgba), save(tmp_path / "photos/2.png", rgba)
    save(tmp_path / "photos/3.png", colored())
    save(tmp_path / "masks/2.png", 255 - SPOT)
    first, second, third = load(tmp_path, use_alpha_mask=True)
    assert np.array_equal(mask_values(first), SPOT)
    assert np.array_equal(mask_values(second), 255 - SPOT)
    assert (mask_values(third) == 255).all()


CROPS = [
    Crop(24, 24, *parts) for parts in itertools.product((0, 0.4, 1), (0, 0.5, 1), (False, True))
]


@pytest.mark.parametrize("crop", CROPS)
def test_a_mask_is_cut_and_flipped_as_its_picture(tmp_path, crop):
    """A picture that is its mask: each latent has the mean of its pixels."""
    save(tmp_path / "photos/1.png", colored()), save(tmp_path / "masks/1.png")
    (picture,) = load(tmp_path)
    pixels = (crop(picture.decode())[:1] + 1) / 2
    expected = F.avg_pool2d(pixels, 2)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(latent_mask(picture, crop, 12, 12), expected)


@pytest.mark.parametrize("size", [16, 40])
def test_white_and_black_stay_so_when_they_are_resized(tmp_path, size):
    save(tmp_path / "photos/1.png", colored())
    for value in (0, 255):
        save(tmp_path / "masks/1.png", np.full_like(SPOT, value))
        (picture,) = load(tmp_path)
        assert set(latent_mask(picture, Crop(size, size, 0.3), 4, 4).flatten().tolist()) == {
            value / 255
        }


# What is said about it


def warnings(folder, **keys):
    intake = Intake()
    check_masks(intake, load(folder, intake, **keys), 0.1)
    return [note.text for note in intake.notes if note.level == "warning"]


def test_good_masks_give_no_warning(tmp_path):
    save(tmp_path / "photos/1.png", colored()), save(tmp_path / "masks/1.png")
    assert warnings(tmp_path) == []


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.zeros_like(SPOT), "masks that show nothing"),
        (SPOT // 255, "masks that show nothing"),
        (np.full_like(SPOT, 255), "white everywhere"),
        (SPOT[::2, ::2], "of another size than their picture"),
        (SPOT[:, ::2], "of another shape than their picture"),
        (np.ascontiguousarray(SPOT.T), "of another shape than their picture"),
    ],
    ids=["black", "classes", "white", "smaller", "squeezed", "on its side"],
)
def test_an_odd_mask_is_named(tmp_path, mask, text):
    save(tmp_path / "photos/1.png", colored()), save(tmp_path / "masks/1.png", mask)
    (found,) = warnings(tmp_path)
    assert text in found
    assert found.endswith(": 1.png")


def test_pictures_without_masks_and_masks_without_pictures_are_named(tmp_path):
    for name in ("photos/1.png", "photos/2.png", "masks/2.png", "masks/3_mask.png"):
        save(tmp_path / name, colored())
    save(tmp_path / "masks/notes.psd.png"), (tmp_path / "masks/a.psd").write_bytes(b"x")
    found = "\n".join(warnings(tmp_path))
    assert "pictures without a mask, which count everywhere: 1.png" in found
    assert "masks without a picture of that name: 3_mask.png, notes.psd.png" in found
    assert "not used: 1 .psd (a.psd)" in found


# The config


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"mask_floor": 0.5}, "data.mask_floor"),
        ({"mask_dir": "nowhere"}, "data.mask_dir"),
        ({"dataset_name": "a/b", "instance_data_dir": None, "mask_dir": "."}, "data.mask_dir"),
    ],
)
def test_masks_that_cannot_be_are_refused_by_their_key(settings, keys, path):
    with pytest.raises(UserError, match=path.replace(".", r"\.")):
        settings(*(f"data.{key}={json.dumps(value)}" for key, value in keys.items()))


def test_the_default_leaves_a_tenth():
    assert DataConfig().mask_floor == 0.1


@pytest.mark.parametrize("name", ["1_MASK.png", "1-MaskLabel.png"])
def test_the_case_of_an_ending_does_not_count(tmp_path, name):
    save(tmp_path / "photos/1.jpg", colored())
    save(tmp_path / "photos" / name)
    (picture,) = load(tmp_path, mask_dir=tmp_path / "photos")
    assert picture.mask.name.endswith(name)


def test_a_mask_of_16_bits_whose_lowest_value_is_white_is_read_so(tmp_path):
    save(tmp_path / "photos/1.png", colored())
    deep = (257 * SPOT.astype(np.uint16)).astype(np.uint16)
    (tmp_path / "masks").mkdir()
    tags = {262: 0}  # photometric interpretation: white is zero
    Image.fromarray(65535 - deep).save(tmp_path / "masks/1.tif", tiffinfo=tags)
    (picture,) = load(tmp_path)
    assert np.array_equal(np.asarray(decode_mask(picture)), SPOT)


def test_a_mask_that_changes_after_its_digest_was_taken_is_an_error(tmp_path):
    save(tmp_path / "photos/1.png", colored())
    mask = save(tmp_path / "masks/1.png")
    (picture,) = load(tmp_path)
    decode_mask(picture)
    save(mask, 255 - SPOT)
    with pytest.raises(UserError, match=r"masks/1\.png has changed since the run began"):
        decode_mask(picture)
