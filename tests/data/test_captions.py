"""Captions have one precedence: a text file, a line of metadata, the prompt."""

import json

import pytest
from PIL import Image

from tests.shared.pictures import data
from trainers.data.photo_sets import (
    load_class_pictures,
    load_held_out_pictures,
    load_instance_pictures,
)
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
    with pytest.raises(
        UserError, match=r"no caption for without\.png in .*: set data.instance_prompt"
    ):
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


def test_lines_are_one_caption_or_with_choose_several(put, tmp_path):
    put("a.png"), put("b.png")
    put("a.txt", b"a dog\n\n  on grass \r\n")
    line = {"file_name": "b.png", "text": "a cat\non grass"}
    put("metadata.jsonl", json.dumps(line).encode())

    def captions(**keys):
        return [p.captions for p in load_instance_pictures(data(tmp_path, **keys))]

    assert captions() == [("a dog on grass",), ("a cat\non grass",)]
    assert captions(caption_lines="choose") == [("a dog", "on grass"), ("a cat", "on grass")]


def test_a_list_in_metadata_is_several_captions(put, tmp_path):
    put("a.png")
    line = {"file_name": "a.png", "text": ["a dog ", "a dog on\ngrass"]}
    put("metadata.jsonl", json.dumps(line).encode())
    for lines in ("join", "choose"):
        (picture,) = load_instance_pictures(data(tmp_path, caption_lines=lines))
        assert picture.captions == ("a dog", "a dog on\ngrass")


def test_a_list_in_a_column_is_several_captions(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "text": [["a dog", "a pet"], []]}
    features = datasets.Features({"image": datasets.Image(), "text": [datasets.Value("string")]})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set.parquet")
    keys = {"dataset_name": str(tmp_path / "set.parquet"), "caption_column": "text"}
    pictures = load_instance_pictures(data(**keys, caption_prefix="sks,"))
    assert [p.captions for p in pictures] == [("sks, a dog", "sks, a pet"), ("sks, prompt",)]


def test_trigger_and_prefix_are_put_into_every_caption_and_held_out_ones_never_vary(put, tmp_path):
    put("a.png"), put("b.png")
    put("a.txt", b"[trigger] dog, grass, day")
    settings = data(
        tmp_path,
        trigger="sks",
        caption_prefix="a photo of",
        caption_suffix=", day",
        shuffle_tags=True,
        held_out_dir=tmp_path,
        class_prompt="a dog",
        num_class_images=2,
    )
    captions = ["a photo of sks dog, grass, day, day", "a photo of prompt, day"]
    learnt, held_out = load_instance_pictures(settings), load_held_out_pictures(settings)
    assert [p.caption for p in learnt] == [p.caption for p in held_out] == captions
    assert [p.wording.variants for p in (*learnt, *held_out)] == [8, 8, 1, 1]
    # class pictures keep what they have
    shown = load_class_pictures(tmp_path, settings.sets[0], settings)
    assert [p.caption for p in shown] == ["sks dog, grass, day", "a dog"]
    assert {p.wording.variants for p in shown} == {1}


def test_a_place_for_a_trigger_that_is_not_set_names_its_picture(put, tmp_path):
    put("a.png")
    put("a.txt", b"{trigger} dog")
    with pytest.raises(UserError, match=r"a\.png: the caption .*data\.trigger"):
        load_instance_pictures(data(tmp_path))
