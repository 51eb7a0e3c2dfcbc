"""Where mistakes do not end the reading, each file that has one is named, and the others count."""

import pytest
from PIL import Image

from trainers.data.captions import read_captions
from trainers.data.folders import scan_folder
from trainers.data.intake import Intake
from trainers.data.valid_captions import read_valid_captions
from trainers.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f"caption {i}")
    return tmp_path


def read(folder, keeps_going=True, column=None):
    intake, contents = Intake(keeps_going=keeps_going), scan_folder(folder)
    captions = read_valid_captions(contents, lambda some: read_captions(some, column), intake)
    texts = {path.stem: text for path, (text,) in captions.by_picture.items()}
    return texts, {name.rpartition("/")[2] for name in intake.left_out}, intake


def test_without_mistakes_it_is_the_reading_itself(folder):
    assert read(folder)[0] == {f"{i:02d}": f"caption {i}" for i in range(20)}
    assert read(folder, keeps_going=False)[0] == read(folder)[0]


def test_every_file_with_a_mistake_is_named_and_no_other(folder):
    (folder / "03.txt").write_text("")
    (folder / "17.txt").write_bytes(b"\xfe\xfd\xfc")
    (folder / "nobody.txt").write_text("x")
    texts, left_out, intake = read(folder)
    assert left_out == {"03.txt", "17.txt", "nobody.txt"}
    assert texts.keys() == {f"{i:02d}" for i in range(20)} - {"03", "17"}
    assert [note.level for note in intake.notes] == ["error"] * 3
    with pytest.raises(UserError):
        read(folder, keeps_going=False)


def test_of_two_that_contradict_each_other_one_is_left_out(folder):
    (folder / "09.caption").write_text("another one")
    texts, left_out, _ = read(folder)
    assert len(left_out) == 1
    assert left_out <= {"09.caption", "09.txt"}
    assert len(texts) == 20


def test_a_broken_metadata_file_takes_no_text_file_with_it(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "title": "x"}\n{broken')
    texts, left_out, _ = read(folder)
    assert left_out == {"metadata.jsonl"}
    assert len(texts) == 20


def test_a_column_that_no_file_has_is_one_error_and_no_files(folder):
    texts, left_out, intake = read(folder, column="title")
    assert (texts, left_out) == ({}, set())
    (note,) = intake.notes
    assert "data.caption_column is 'title'" in note.text
