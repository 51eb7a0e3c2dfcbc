"""Every usual kind of mask is read; what is none, or has no partner, is named."""

import io
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.shared.processes import start
from trainers.config import loading
from trainers.data.pictures import Picture
from trainers.errors import UserError
from trainers.from_scratch.uses.segment import read_mask
from trainers.run import run


def picture_of(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return Picture("some/mask.png", buffer.getvalue, "")


CLASSES = np.random.default_rng(0).integers(0, 2, (6, 7))
ACCEPTED = {
    "0 and 1": Image.fromarray(CLASSES.astype(np.uint8)),
    "0 and 255": Image.fromarray((255 * CLASSES).astype(np.uint8)),
    "one bit": Image.fromarray(CLASSES.astype(bool)),
    "three equal channels": Image.fromarray((255 * CLASSES).astype(np.uint8)).convert("RGB"),
    "opaque in colour": Image.fromarray((255 * CLASSES).astype(np.uint8)).convert("RGBA"),
    "opaque in grey": Image.fromarray((255 * CLASSES).astype(np.uint8)).convert("LA"),
    "sixteen bits": Image.fromarray(CLASSES.astype(np.uint16)),
}


@pytest.mark.parametrize("image", ACCEPTED.values(), ids=ACCEPTED)
def test_every_usual_kind_of_mask_is_read(image):
    assert np.array_equal(np.asarray(read_mask(picture_of(image), 2)), CLASSES)


def test_a_mask_with_a_palette_holds_indices():
    indices = np.random.default_rng(0).integers(0, 3, (6, 7)).astype(np.uint8)
    image = Image.new("P", (7, 6))
    image.putdata(indices.flatten().tolist())
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert np.array_equal(np.asarray(read_mask(picture_of(image), 3)), indices)


def test_classes_and_what_is_to_be_ignored_keep_their_numbers_when_resized():
    array = np.random.default_rng(0).choice([0, 1, 2, 255], (6, 7)).astype(np.uint8)
    mask = read_mask(picture_of(Image.fromarray(array)), 3)
    assert np.array_equal(np.asarray(mask), array)
    resized = np.asarray(mask.resize((16, 16), Image.Resampling.LANCZOS))
    assert set(np.unique(resized)) <= {0, 1, 2, 255}


REFUSED = {
    "other values": (Image.fromarray(np.array([[0, 128, 7]], np.uint8)), "has the values 7, 128"),
    "a class too many": (Image.fromarray(np.array([[0, 1, 2]], np.uint8)), "has the values 2"),
    "sixteen bits": (Image.fromarray(np.array([[0, 700]], np.uint16)), "has the values 700"),
    "colour": (Image.new("RGB", (3, 3), "red"), "is in colour"),
}


@pytest.mark.parametrize(("image", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_mask_is_refused_by_name(image, message):
    with pytest.raises(UserError, match=rf"^some/mask.png {message}"):
        read_mask(picture_of(image), 2)


def test_a_mask_damaged_by_jpeg_is_refused_with_advice():
    with pytest.raises(UserError, match="JPEG spoils masks"):
        read_mask(
            picture_of(
                Image.fromarray((255 * np.kron(CLASSES, np.ones((5, 5)))).astype(np.uint8)), "JPEG"
            ),
            2,
        )


def break_mask(folder):
    (folder / "3_mask.png").write_bytes(b"no picture")
    return r"3_mask.png is not a readable mask"


def break_picture(folder):
    (folder / "3_image.png").write_bytes(b"no picture")
    return r"3_image.png is not a readable picture"


def shrink_mask(folder):
    Image.new("L", (5, 6)).save(folder / "3_mask.png")
    return r"3_image.png and .*3_mask.png are not of one size: 25 x 23 and 5 x 6"


def lose_mask(folder):
    (folder / "3_mask.png").unlink()
    return r"1 pictures have no partner, such as '3': there is no 3_mask"


def lose_picture(folder):
    (folder / "3_image.png").unlink()
    return r"1 pictures have no partner, such as '3': there is no 3_image"


def lose_everything(folder):
    for path in folder.iterdir():
        path.unlink()
    return "there is no picture"


DAMAGES = [break_mask, break_picture, shrink_mask, lose_mask, lose_picture, lose_everything]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("crop", [False, True])
def test_pairs_that_do_not_fit_are_named_before_training(settings, blobs, tmp_path, damage, crop):
    folder = shutil.copytree(blobs, tmp_path / "damaged")
    message = damage(folder)
    with pytest.raises(UserError, match=message):
        run(settings("segment", f"data.image_dir={folder}", f"data.crop={crop}", "data.folds=null"))


def test_a_grey_picture_teaches_no_colours(settings, coloured, tmp_path):
    folder = shutil.copytree(coloured, tmp_path / "some")
    Image.new("L", (20, 20)).save(folder / "grey.png")
    with pytest.raises(UserError, match=r"grey.png is grey"):
        run(settings("colorize", f"data.image_dir={folder}", "data.folds=null"))


def test_an_empty_split_is_named(settings, bars, tmp_path):
    rows = datasets.Dataset.from_parquet(str(bars / "train.parquet")).select([])
    (tmp_path / "empty").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"empty/{split}.parquet")
    source = ("data.image_dir=null", "data.folds=null", f"data.dataset_name={tmp_path}/empty")
    with pytest.raises(UserError, match="split 'train'"):
        run(settings("restore", *source))


def test_the_script_tells_a_users_mistake_in_a_line_and_ends_with_2(settings, blobs, tmp_path):
    folder = shutil.copytree(blobs, tmp_path / "damaged")
    message = lose_mask(folder)
    (tmp_path / "damaged.yaml").write_text(
        loading.dump_config(settings("segment", f"data.image_dir={folder}"))
    )
    process = start("train.py", tmp_path / "damaged.yaml", log=tmp_path / "log")
    process.join()
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 2
    assert message.replace("\\", "") in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("use", "overrides", "message"),
    [
        ("segment", ["data.resolution=15"], "data.resolution: must be a multiple of 2"),
        (
            "segment",
            ["data.resolution=20", "model.patch_size=4"],
            "data.resolution: must be a multiple of 8",
        ),
        ("colorize", ["data.channels=1"], "data.channels: colorize requires color pictures"),
        ("restore", ["objective.classes=3"], "objective.classes: has no effect with restore"),
        ("segment", ["data.image_suffix=_mask"], "data.target_suffix"),
        (
            "segment",
            ["data.image_dir=null", "data.dataset_name=x"],
            "data.target_column: segment requires the column",
        ),
    ],
)
def test_mistakes_in_the_config_are_named(settings, use, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(use, *overrides)
