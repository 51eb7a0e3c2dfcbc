"""A start does not decode photos that it knows, and knows a photo by nothing but what it is."""

import os
import random

import numpy as np
import pytest
from PIL import Image

from tests.shared.pictures import data, let_time_pass
from trainers.data import decoding, known_values
from trainers.data.intake import Intake
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.picture_memory import PictureMemory
from trainers.data.pictures import picture_from_file
from trainers.errors import UserError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        write_photo(folder / f"{i}.png", i)
    return folder


@pytest.fixture
def decodings(monkeypatch):
    """What was decoded."""
    contents, plain = [], decoding.decode

    def decode(content, bit_depth=None):
        contents.append(content)
        return plain(content, bit_depth)

    monkeypatch.setattr(decoding, "decode", decode)
    return contents


@pytest.fixture
def start(tmp_path):
    """A function: keys of the config -> the pictures of a run, with what earlier ones have
    noted."""

    def load(**keys):
        intake = Intake()
        intake.memory.load(tmp_path / "cache/pictures.json")
        pictures = load_instance_pictures(data(tmp_path / "photos", **keys), intake)
        intake.memory.save()
        return pictures

    return load


@pytest.fixture
def settled(monkeypatch):
    """What was written just now counts as old."""
    monkeypatch.setattr(known_values, "SETTLED_SECONDS", 0)


def write_photo(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)  # of one size, whatever they show


def known(pictures):
    return [(picture.digest, picture.facts, picture.storage) for picture in pictures]


@pytest.mark.usefixtures("settled")
def test_a_photo_is_decoded_once_and_again_only_when_it_has_changed(start, photos, decodings):
    first = known(start())
    assert len(decodings) == 6
    assert known(start()) == first
    assert len(decodings) == 6
    path = photos / "3.png"
    stamp = path.stat()
    let_time_pass(path)
    write_photo(path, 9)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    again = known(start())
    assert [i for i in range(6) if again[i] != first[i]] == [3]
    assert len(decodings) == 7
    let_time_pass(path)
    os.utime(path)
    assert known(start()) == again
    assert len(decodings) == 7


@pytest.mark.usefixtures("settled")
def test_a_photo_that_breaks_is_named_whatever_was_noted(start, photos):
    start()
    let_time_pass(photos / "2.png")
    content = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(content[:60] + bytes(len(content) - 60))
    with pytest.raises(UserError, match=r"2\.png is not a readable picture"):
        start()
    (photos / "2.png").unlink()
    (photos / "2.png").symlink_to(photos / "nothing.png")
    with pytest.raises(UserError, match=r"2\.png is a link to a file that is not there"):
        start()


def test_a_photo_of_this_moment_is_not_known_by_its_times(start, photos, decodings, tmp_path):
    """A second change within the disk's step of time would not be seen."""
    start()
    assert '"file ' not in (tmp_path / "cache/pictures.json").read_text()
    old = photos / "0.png"
    for path in photos.iterdir():
        os.utime(path, (0, 0))
    # a time that can be set says nothing: it was changed just now
    assert known_values.settled_state(old) is None


@pytest.mark.usefixtures("settled")
def test_a_photo_under_another_name_is_known_by_its_content(start, photos, decodings):
    first = known(start())
    (photos / "0.png").rename(photos / "a.png")
    assert known(start()) == first[1:] + first[:1]
    assert len(decodings) == 6


@pytest.mark.usefixtures("settled")
def test_bits_of_deep_pictures_are_a_part_of_what_is_known(start, photos):
    for path in photos.iterdir():
        path.unlink()
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64
    Image.fromarray(values).save(photos / "gray.png")
    twelve, sixteen = (known(start(bit_depth=bits)) for bits in (12, 16))
    assert twelve[0][0] != sixteen[0][0]
    assert twelve[0][1].fingerprint != sixteen[0][1].fingerprint
    assert known(start(bit_depth=12)) == twelve
    assert known(start(bit_depth=16)) == sixteen


@pytest.mark.usefixtures("settled")
def test_notes_that_are_damaged_anywhere_are_not_believed(start, photos, tmp_path):
    first, store = known(start()), tmp_path / "cache/pictures.json"
    whole, rng = store.read_bytes(), random.Random(0)
    for offset in rng.sample(range(len(whole)), 60):
        changed = bytearray(whole)
        changed[offset] ^= 1 << rng.randrange(8)
        for content in (bytes(changed), whole[:offset]):
            store.write_bytes(content)
            assert known(start()) == first


@pytest.mark.usefixtures("settled")
def test_rows_of_a_data_set_are_known_by_their_content(tmp_path, photos, decodings):
    import datasets

    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.iterdir())]
    features = datasets.Features({"image": datasets.Image()})
    table = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"image": rows}, features).to_parquet(table)
    config = data(None, dataset_name=str(table))
    for number in (6, 6):
        intake = Intake()
        intake.memory.load(tmp_path / "cache/pictures.json")
        assert len(load_instance_pictures(config, intake)) == 6
        intake.memory.save()
        assert len(decodings) == number


def test_a_photo_that_changes_after_it_was_examined_is_not_taken_for_what_it_was(tmp_path):
    """Else the pixels of the new one would be cached as those of the old one, for good."""
    path = tmp_path / "1.png"
    Image.new("RGB", (8, 8), "red").save(path)
    picture = PictureMemory().examine(picture_from_file(path))
    assert picture.decode().getpixel((0, 0)) == (255, 0, 0)
    Image.new("RGB", (8, 8), "blue").save(path)
    with pytest.raises(UserError, match=r"1\.png has changed since the run began: start it again"):
        picture.decode()
