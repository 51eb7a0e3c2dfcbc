"""A caption reaches its picture however its file is named, and one that reaches none is named."""

import json
import unicodedata

import pytest
from PIL import Image

from trainers.config import DataConfig
from trainers.data.pictures import load_held_out_pictures, load_instance_pictures
from trainers.errors import UserError


@pytest.fixture
def put(tmp_path):
    """A function that writes text, bytes or, for a picture's name, a picture into the folder."""

    def write(name, content=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8)).save(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, "utf-8")

    return write


def captions(folder, **keys):
    """Caption by name within the folder."""
    settings = {"instance_data_dir": folder, "instance_prompt": "prompt", **keys}
    pictures = load_instance_pictures(DataConfig(**settings))
    return {p.name.removeprefix(f"{folder}/"): p.caption for p in pictures}


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# Text files


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        ("1.jpg", "1.txt"),
        ("1.jpg", "1.TXT"),
        ("1.jpg", "1.caption"),
        ("1.JPG", "1.jpg.txt"),
        ("Photo.jpg", "photo.txt"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.txt")),
        (unicodedata.normalize("NFC", "É.jpg"), unicodedata.normalize("NFD", "é.txt")),
        ("sub/1.jpg", "sub/1.txt"),
        ("1.tar.jpg", "1.tar.txt"),
    ],
)
def test_a_text_file_is_its_pictures_caption(put, tmp_path, picture, text):
    put(picture)
    put(text, " a dog\r\n")
    assert captions(tmp_path) == {picture: "a dog"}


def test_the_exact_name_comes_before_one_that_is_alike(put, tmp_path):
    for name in ("a", "A"):
        put(f"{name}.png")
        put(f"{name}.txt", f"of {name}")
    assert captions(tmp_path) == {"a.png": "of a", "A.png": "of A"}


def test_lines_of_a_caption_are_one_text(put, tmp_path):
    put("1.png")
    put("1.txt", "a dog,\n\n  on grass\n")
    assert captions(tmp_path) == {"1.png": "a dog, on grass"}


def test_two_captions_of_one_picture_are_refused_unless_they_are_the_same(put, tmp_path):
    put("1.png")
    put("1.txt", "a dog")
    put("1.caption", "a dog")
    assert captions(tmp_path) == {"1.png": "a dog"}
    put("1.caption", "a cat")
    with pytest.raises(UserError, match=r"1\.png has two captions, in 1\.caption and 1\.txt"):
        captions(tmp_path)


@pytest.mark.parametrize("name", ["2.txt", "sub/1.txt", "1_.caption", "notes.txt"])
def test_a_text_file_without_its_picture_is_named(put, tmp_path, name):
    put("1.png")
    put(name, "a dog")
    with pytest.raises(UserError, match=f"no picture belongs to {name}"):
        captions(tmp_path)


def test_many_orphans_are_counted_beyond_a_handful(put, tmp_path):
    put("1.png")
    for i in range(10, 30):
        put(f"{i}.txt", "a dog")
    with pytest.raises(UserError, match=r"10\.txt, .*14\.txt and 15 more"):
        captions(tmp_path)


@pytest.mark.parametrize("name", ["README.txt", "license.txt", "._1.txt", ".DS_Store", "Thumbs.db"])
def test_what_is_about_the_folder_or_of_the_system_is_no_orphan(put, tmp_path, name):
    put("1.png")
    put(name, "about")
    assert captions(tmp_path) == {"1.png": "prompt"}


@pytest.mark.parametrize("content", ["", " \n\t\r\n", "\ufeff"])
def test_an_empty_caption_is_refused(put, tmp_path, content):
    put("1.png")
    put("1.txt", content)
    with pytest.raises(UserError, match=r"1\.txt is empty: write a caption"):
        captions(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl", "metadata.csv"])
def test_text_is_read_in_each_encoding_that_says_which_it_is(put, tmp_path, encoding, name):
    put("1.png")
    rows = {
        "1.txt": "ein Hündchen",
        "metadata.jsonl": lines({"file_name": "1.png", "text": "ein Hündchen"}),
        "metadata.csv": "file_name,text\n1.png,ein Hündchen\n",
    }
    put(name, rows[name].encode(encoding))
    assert captions(tmp_path) == {"1.png": "ein Hündchen"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["Hündchen", "dog"])
def test_text_in_another_encoding_is_refused(put, tmp_path, encoding, text):
    put("1.png")
    put("1.txt", text.encode(encoding))
    if encoding == "latin-1" and text.isascii():
        assert captions(tmp_path) == {"1.png": text}
        return
    with pytest.raises(UserError, match=r"1\.txt is not UTF-8 text"):
        captions(tmp_path)


# Metadata


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "semicolons", "tabs"])
@pytest.mark.parametrize("name", ["0.jpg", "./0.jpg", "0.JPG"])
def test_metadata_has_the_caption_in_any_usual_column(put, tmp_path, column, kind, name):
    put("0.jpg")
    caption = "a dog, on grass"
    if kind == "jsonl":
        put("metadata.jsonl", lines({"file_name": name, column: caption}))
    else:
        mark = {"csv": ",", "semicolons": ";", "tabs": "\t"}[kind]
        put("metadata.csv", f'file_name{mark}{column}\r\n{name}{mark}"{caption}"\r\n')
    assert captions(tmp_path) == {"0.jpg": caption}


@pytest.mark.parametrize("name", ["sub/0.jpg", "sub\\0.jpg", ".\\sub\\0.jpg", "x/../SUB/0.jpg"])
def test_metadata_names_pictures_of_sub_folders(put, tmp_path, name):
    put("sub/0.jpg")
    put("metadata.jsonl", lines({"file_name": name, "text": "a dog"}))
    assert captions(tmp_path) == {"sub/0.jpg": "a dog"}


def test_metadata_of_a_sub_folder_is_relative_to_it(put, tmp_path):
    put("0.jpg")
    put("sub/0.jpg")
    put("sub/metadata.csv", "file_name,text\n0.jpg,a dog\n")
    assert captions(tmp_path) == {"0.jpg": "prompt", "sub/0.jpg": "a dog"}


def test_of_several_columns_text_comes_first_unless_one_is_chosen(put, tmp_path):
    put("0.jpg")
    row = {"prompt": "p", "caption": "c", "text": "t", "other": "o", "file_name": "0.jpg"}
    put("metadata.jsonl", lines(row))
    assert captions(tmp_path) == {"0.jpg": "t"}
    assert captions(tmp_path, caption_column="other") == {"0.jpg": "o"}


def test_a_caption_may_hold_what_unicode_counts_as_a_line_break(put, tmp_path):
    put("0.jpg")
    caption = "a dog\u2028on\x85grass"
    put("metadata.jsonl", lines({"file_name": "0.jpg", "text": caption}))
    assert captions(tmp_path) == {"0.jpg": caption}


REFUSED = {
    "no such picture": ({"file_name": "1.jpg", "text": "x"}, r"no picture 1\.jpg \(line 2\)"),
    "outside": ({"file_name": "../0.jpg", "text": "x"}, r"no picture \.\./0\.jpg \(line 2\)"),
    "a number": ({"file_name": "0.jpg", "text": 3}, r"line 2: 'text' is 3, which is not text"),
    "a list of numbers": ({"file_name": "0.jpg", "text": ["x", 3]}, r"'text' is 3, .*not text"),
    "an object": ({"file_name": "0.jpg", "text": {"a": "x"}}, r"line 2: 'text' is .*not text"),
    "an empty list": ({"file_name": "0.jpg", "text": []}, r"line 2: 'text' is an empty list"),
    "an empty one": ({"file_name": "0.jpg", "text": ["x", " "]}, r"line 2: 'text' is empty"),
    "empty": ({"file_name": "0.jpg", "text": " "}, r"line 2: 'text' is empty"),
    "another caption": ({"file_name": "./0.jpg", "text": "x"}, r"0\.jpg has two captions"),
    "no name": ({"text": "x"}, r"line 2: not like .*no file_name"),
    "a number as name": ({"file_name": 0, "text": "x"}, r"line 2: not like"),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_line_of_metadata_is_named_with_its_number(put, tmp_path, row, message):
    put("0.jpg")
    put("metadata.jsonl", lines({"file_name": "0.jpg", "text": "a dog"}, row))
    with pytest.raises(UserError, match=message):
        captions(tmp_path)


BROKEN = {
    "no JSON": ("metadata.jsonl", '\n{"file_name": "0.jpg", "te', r"jsonl, line 2: not like"),
    "no object": ("metadata.jsonl", '\n["0.jpg"]', r"jsonl, line 2: not like"),
    "deep": ("metadata.jsonl", "[" * 100_000, r"jsonl, line 1: not like"),
    "no captions": ("metadata.jsonl", '{"file_name": "0.jpg", "label": 1}', "none of the columns"),
    "empty": ("metadata.jsonl", "", "none of the columns"),
    "too many fields": ("metadata.csv", "file_name,text\n0.jpg,a,b", r"csv, line 2: not a line"),
    "too few fields": ("metadata.csv", "file_name,text\n0.jpg", r"csv, line 2: not a line"),
    "no end": ("metadata.csv", 'file_name,text\n0.jpg,"a', r"csv, line 2: not a line"),
    "no file name": ("metadata.csv", "image,text\n0.jpg,a", "no column file_name .*image, text"),
    "empty table": ("metadata.csv", "", "it is empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_metadata_is_named(put, tmp_path, name, content, message):
    put("0.jpg")
    put(name, content)
    with pytest.raises(UserError, match=message):
        captions(tmp_path)


def test_a_caption_column_without_metadata_is_refused(put, tmp_path):
    put("0.jpg")
    put("0.txt", "a dog")
    with pytest.raises(UserError, match=r"data\.caption_column is 'words', and .* neither"):
        captions(tmp_path, caption_column="words")


def test_a_missing_caption_takes_the_prompt(put, tmp_path):
    put("0.jpg")
    put("1.jpg")
    rows = {"file_name": "0.jpg", "text": None}, {"file_name": "1.jpg", "text": "a dog"}
    put("metadata.jsonl", lines(*rows))
    assert captions(tmp_path) == {"0.jpg": "prompt", "1.jpg": "a dog"}


def test_held_out_pictures_are_captioned_by_the_same_column(put, tmp_path):
    put("train/0.jpg")
    put("held/1.jpg")
    for name in ("train/0.jpg", "held/1.jpg"):
        folder, _, file_name = name.partition("/")
        put(f"{folder}/metadata.jsonl", lines({"file_name": file_name, "words": name, "text": "x"}))
    config = DataConfig(
        instance_data_dir=tmp_path / "train",
        held_out_dir=tmp_path / "held",
        caption_column="words",
    )
    (picture,) = load_held_out_pictures(config)
    assert picture.caption == "held/1.jpg"


# Data sets


@pytest.mark.parametrize("caption", [3, [3], True, 1.5])
def test_a_column_that_holds_no_text_is_named(tmp_path, monkeypatch, caption):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "words": [caption] * 2}
    features = datasets.Dataset.from_dict({"words": rows["words"]}).features
    features["image"] = datasets.Image()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"data\.caption_column: .*set\.parquet\[0\] .*not text"):
        captions(None, dataset_name=str(tmp_path / "set.parquet"), caption_column="words")
