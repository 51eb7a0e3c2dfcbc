"""Captions have one precedence: a text file, a line of metadata, the prompt."""

import json

import pytest

from tests.shared.pictures import data
from trainers.data.photo_sets import load_instance_pictures
from trainers.errors import UserError


def test_a_caption_is_its_text_file_else_its_metadata_line_else_the_prompt(put, tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        put(name)
    put("a.txt", "  from é the file \n".encode())
    lines = [
        {"file_name": name, "text": "from metadata", "other": "from column"}
        for name in ("a.png", "b.png")
    ]
    put("metadata.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    captions = [p.caption for p in load_instance_pictures(data(tmp_path))]
    assert captions == ["from é the file", "from metadata", "prompt"]
    captions = [p.caption for p in load_instance_pictures(data(tmp_path, caption_column="other"))]
    assert captions == ["from é the file", "from column", "prompt"]


def test_pictures_without_any_caption_are_named(put, tmp_path):
    put("with.png")
    put("with.txt", b"a caption")
    put("without.png")
    with pytest.raises(UserError, match=r"no caption for without.png: set data.instance_prompt"):
        load_instance_pictures(data(tmp_path, instance_prompt=None))


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.png", "text"',
        '{"text": "no file name"}',
        '["a.png"]',
        '{"file_name": "a.png", "text": 3}',
    ],
)
def test_a_wrong_metadata_line_is_the_users_mistake(put, tmp_path, line):
    put("a.png")
    put("metadata.jsonl", line.encode())
    with pytest.raises(UserError, match=r"metadata.jsonl"):
        load_instance_pictures(data(tmp_path))


def test_a_caption_column_that_metadata_lacks_is_reported(put, tmp_path):
    put("a.png")
    put("metadata.jsonl", b'{"file_name": "a.png", "text": "a caption"}')
    with pytest.raises(UserError, match=r"data.caption_column.*text"):
        load_instance_pictures(data(tmp_path, caption_column="txt"))


def test_a_caption_file_is_utf_8_with_or_without_a_mark(put, tmp_path):
    put("a.png")
    put("a.txt", "a dog".encode("utf-8-sig"))
    assert [p.caption for p in load_instance_pictures(data(tmp_path))] == ["a dog"]
    put("a.txt", "café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt"):
        load_instance_pictures(data(tmp_path))
