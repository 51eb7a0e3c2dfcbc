"""Folders with pictures: what is read, how often it counts, and what is not used and said so."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from trainers.config import AutoencoderConfig, DataConfig, DreamBoothConfig, UNetConfig
from trainers.data.buckets import BucketRule, repeat_pictures
from trainers.data.intake import Intake
from trainers.data.photo_checks import load_photos
from trainers.data.photo_sets import load_instance_pictures
from trainers.errors import UserError
from trainers.from_scratch.checks import warn_of_data
from trainers.from_scratch.image_sets import load_images


@pytest.fixture
def put(tmp_path):
    """A function that saves a new random picture of a size, or text, into a folder of photos."""
    random = np.random.default_rng(0)

    def write(name, size=(8, 8), content=None):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        else:
            Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
        return path

    return write


def notes(tmp_path, **keys):
    """The notes of a run on the folder of photos, and those of them that are warnings."""
    data = {"instance_data_dir": tmp_path / "photos", "instance_prompt": "p", "resolution": 8}
    config = DreamBoothConfig(data={**data, **keys})
    rule = BucketRule.from_config(config)
    intake, _, _ = load_photos(config, SimpleNamespace(num_processes=1), rule)
    warnings = [note.text for note in intake.notes if note.level == "warning"]
    return "\n".join(note.text for note in intake.notes), "\n".join(warnings)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("raw.CR2", "save them as JPEG or PNG"),
        ("film.mov", "not taken out"),
        ("captions.csv", "metadata.csv"),
        ("0.json", "a .txt beside each picture"),
    ],
)
def test_a_file_that_was_meant_to_be_used_is_a_warning(put, tmp_path, name, advice):
    put("0.png"), put("1.png"), put(name, content=b"x"), put("notes.md", content=b"x")
    found, warnings = notes(tmp_path)
    assert f"({name})" in warnings
    assert advice in warnings
    assert "not used: 1 .md (notes.md)" in found
    assert "notes.md" not in warnings


def test_a_picture_without_its_ending_is_a_warning(put, tmp_path):
    picture = put("0.png")
    put("1.png"), put("IMG_1", content=picture.read_bytes()), put("NOTES", content=b"x")
    found, warnings = notes(tmp_path)
    assert "1 without ending (IMG_1): they hold pictures" in warnings
    assert "1 without ending (NOTES)" in found


def test_files_that_are_not_used_are_counted_beyond_a_handful(put, tmp_path):
    put("0.png"), put("1.png")
    for i in range(30):
        put(f"sub/{i:02d}.nef", content=b"x")
    found, _ = notes(tmp_path)
    assert (
        "30 .nef (sub/00.nef, sub/01.nef, sub/02.nef, sub/03.nef, sub/04.nef and 25 more)" in found
    )


def test_pictures_of_sub_folders_are_used_and_said(put, tmp_path):
    put("0.png"), put("front/a/1.png"), put("back/2.png"), put("__MACOSX/3.png"), put(".x/4.png")
    found, _ = notes(tmp_path)
    assert "3 pictures" in found
    assert "pictures of sub-folders are used: back, front/a" in found


def test_other_folders_of_the_config_and_runs_are_no_photos(put, tmp_path):
    put("0.png"), put("held/1.png"), put("class/2.png"), put("run/samples/3.png")
    put("run/.lock", content=b"")
    root = tmp_path / "photos"
    found, _ = notes(tmp_path, held_out_dir=root / "held", class_data_dir=root / "class")
    assert "1 pictures in photos" in found
    assert "not read" in found
    assert "class, held, run" in found


def test_links_that_lead_back_are_not_followed_for_ever(put, tmp_path):
    put("sub/0.png"), put("1.png")
    (tmp_path / "photos/sub/loop").symlink_to(tmp_path / "photos/sub")
    assert notes(tmp_path)[0].startswith("2 pictures in photos")


# Folders of kohya's scripts


def test_the_number_of_a_kohya_folder_is_how_often_its_pictures_count(put, tmp_path):
    for name in ("10_sks dog/0.png", "4_sks dog/1.png", "2.png"):
        put(name)
    found, _ = notes(tmp_path)
    assert "counts: 10_sks dog: 10, photos: 1, 4_sks dog: 4" in found
    config = DataConfig(instance_data_dir=tmp_path / "photos", instance_prompt="p")
    pictures = load_instance_pictures(config)
    counts = {p.name.rpartition("/")[2]: p.repeats for p in pictures}
    assert counts == {"0.png": 10, "1.png": 4, "2.png": 1}
    assert [len(repeat_pictures(pictures)), len(repeat_pictures(pictures[:1]))] == [15, 1]
    # 10 and 4 are as 5 and 2
    assert len(repeat_pictures([p for p in pictures if p.repeats > 1])) == 7


def test_its_words_are_the_caption_where_there_is_no_other(put, tmp_path):
    put("10_sks dog/0.png"), put("10_sks dog/1.png"), put("10_sks dog/1.txt", content=b"own")
    folder = tmp_path / "photos"
    captions = [p.caption for p in load_instance_pictures(DataConfig(instance_data_dir=folder))]
    assert captions == ["sks dog", "own"]
    config = DataConfig(instance_data_dir=folder, instance_prompt="p")
    assert [p.caption for p in load_instance_pictures(config)] == ["p", "own"]


def test_a_year_is_no_number_of_repeats_and_zero_is_refused(put, tmp_path):
    put("2023_summer/0.png")
    config = DataConfig(instance_data_dir=tmp_path / "photos", instance_prompt="p")
    assert load_instance_pictures(config)[0].repeats == 1
    put("0_dog/0.png")
    with pytest.raises(UserError, match="0 leaves them out: rename the folder"):
        load_instance_pictures(config)


def test_what_is_deeper_in_a_kohya_folder_counts_as_it_does(put, tmp_path):
    put("10_sks dog/outdoors/0.png"), put("other/4_cat/sub/1.png")
    folder = tmp_path / "photos"
    pictures = load_instance_pictures(DataConfig(instance_data_dir=folder))
    assert [(p.repeats, p.caption) for p in pictures] == [(10, "sks dog"), (4, "cat")]


# Small networks


def test_small_networks_say_what_they_do_not_use(put, tmp_path):
    put("0.png", (8, 8)), put("sub/1.png", (4, 8)), put("0.txt", content=b"x")
    intake = Intake()
    config = AutoencoderConfig(data={"image_dir": tmp_path / "photos", "resolution": 8})
    images = load_images(config.data, "cpu")
    assert len(images) == 2
    warn_of_data(config, images, None, intake)
    text = "\n".join(note.text for note in intake.notes)
    assert "2 pictures in photos" in text
    assert "not used: 1 .txt (0.txt)" in text
    assert "1 of 2 pictures are smaller than data.resolution=8, so enlarged: 1.png" in text


def test_pairs_leave_out_what_has_neither_ending_and_say_so(put, tmp_path):
    for name in ("0_image.png", "0_mask.png", "a/0_image.png", "a/0_mask.png", "0_other.png"):
        put(name)
    intake = Intake()
    config = UNetConfig(use="pix2pix", data={"image_dir": tmp_path / "photos", "resolution": 8})
    images = load_images(config.data, "cpu", read_target=lambda picture: picture.decode())
    assert len(images) == 2
    warn_of_data(config, images, None, intake)
    assert "not used: 1 .png (0_other.png)" in [note.text for note in intake.notes]
