"""Captions are written beside photos that have none, whole or not at all, by what training sees."""

import runpy
import sys

import pytest
from PIL import Image, ImageOps

from tests.shared.captioners import WORDS
from tests.shared.messy_folder import scene
from trainers import captioning
from trainers.captioning import Captioner, CaptionSettings, caption_folder
from trainers.config import DataConfig
from trainers.data.photo_sets import load_instance_pictures
from trainers.errors import UserError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("0.png", "1.jpg", "more/2.png")):
        scene(i).save(folder / name)
    return folder


def texts(folder):
    files = [path for path in folder.rglob("*") if path.suffix in (".txt", ".caption")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(files)}


def script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["caption.py", *map(str, words)])
    return runpy.run_path("scripts/caption.py")["main"]()


def test_each_photo_gets_the_words_of_the_model_and_training_reads_them(photos, blip):
    done = caption_folder(photos, str(blip), CaptionSettings(batch_size=2))
    assert (done.num_written, done.num_kept, done.failures) == (3, 0, [])
    written = texts(photos)
    assert written.keys() == {"0.txt", "1.txt", "more/2.txt"}
    assert len(set(written.values())) == 3
    for text in written.values():
        assert text.endswith("\n")
        assert set(text.split()) <= set(WORDS)
    pictures = load_instance_pictures(DataConfig(instance_data_dir=photos))
    assert [f"{picture.caption}\n" for picture in pictures] == list(written.values())


def test_the_number_of_photos_at_a_time_changes_no_caption(photos, blip):
    caption_folder(photos, str(blip), CaptionSettings(batch_size=1))
    one = texts(photos)
    caption_folder(photos, str(blip), CaptionSettings(batch_size=3, overwrite=True))
    assert texts(photos) == one


def test_a_photo_is_described_as_it_is_trained_on(tmp_path, blip):
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x112] = 6
    scene(3).save(folder / "turned.png", exif=exif)
    with Image.open(folder / "turned.png") as image:
        ImageOps.exif_transpose(image).save(folder / "upright.png")
    scene(3).save(folder / "lying.png")
    caption_folder(folder, str(blip), CaptionSettings())
    written = texts(folder)
    assert written["turned.txt"] == written["upright.txt"] != written["lying.txt"]


@pytest.mark.parametrize("name", ["0.txt", "0.caption", "0.png.txt", "metadata.jsonl"])
def test_a_caption_that_is_there_stays_unless_it_is_to_be_replaced(photos, blip, name):
    own = '{"file_name": "0.png", "text": "mine"}' if name == "metadata.jsonl" else "mine"
    (photos / name).write_text(own)
    done = caption_folder(photos, str(blip), CaptionSettings())
    assert (done.num_written, done.num_kept) == (2, 1)
    assert (photos / name).read_text() == own
    done = caption_folder(photos, str(blip), CaptionSettings(overwrite=True))
    assert done.num_written == 3
    pictures = load_instance_pictures(DataConfig(instance_data_dir=photos))
    assert "mine" not in [picture.caption for picture in pictures]


def test_what_was_stopped_goes_on_and_leaves_no_half_file(photos, blip, monkeypatch):
    write, written = captioning.write_atomic, []

    def stop_at_the_second(path, text):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, text)

    monkeypatch.setattr(captioning, "write_atomic", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        caption_folder(photos, str(blip), CaptionSettings(batch_size=1))
    assert len(texts(photos)) == 1
    monkeypatch.setattr(captioning, "write_atomic", write)
    done = caption_folder(photos, str(blip), CaptionSettings())
    assert (done.num_written, done.num_kept) == (2, 1)


def test_two_photos_of_one_name_get_a_file_each(photos, blip):
    scene(9).save(photos / "0.jpg")
    caption_folder(photos, str(blip), CaptionSettings(suffix=".caption"))
    assert {"0.png.caption", "0.jpg.caption", "1.caption"} < texts(photos).keys()
    load_instance_pictures(DataConfig(instance_data_dir=photos))


def test_a_photo_that_cannot_be_read_is_named_and_the_others_are_described(
    photos, blip, monkeypatch, capsys
):
    (photos / "3.png").write_bytes(b"x")
    assert script(monkeypatch, photos, "--model", blip) == 1
    printed = capsys.readouterr()
    assert "3 captions written, 0 were there" in printed.out
    assert "3.png is not a readable picture" in printed.err
    assert "3.txt" not in texts(photos)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (["--trigger", "sks"], "sks, "),
        (["--trigger", "sks", "--prefix", "a {trigger} dog:"], "a sks dog: "),
        (["--prefix", "a drawing,"], "a drawing, "),
        ([], ""),
    ],
)
def test_prefix_and_trigger_stand_before_each_caption(photos, blip, monkeypatch, options, start):
    plain = Captioner(str(blip), None)([scene(0)])[0]
    assert script(monkeypatch, photos, "--model", blip, *options) == 0
    assert texts(photos)["0.txt"] == f"{start}{plain}\n"


def test_a_prompt_reaches_the_model_and_is_no_part_of_the_caption(blip):
    plain, asked = (Captioner(str(blip), prompt)([scene(0)])[0] for prompt in (None, "dog cat"))
    assert plain != asked
    assert not asked.startswith("dog cat")


def test_models_that_cannot_describe_pictures_are_refused_in_a_line(photos, bases, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for model in ("someone/not-here", str(empty), f"{bases['sd15']}/text_encoder"):
        with pytest.raises(UserError, match=r"^--model: .* cannot be loaded") as error:
            caption_folder(photos, model, CaptionSettings())
        assert "\n" not in str(error.value)
    assert texts(photos) == {}


def test_a_folder_without_photos_is_refused_before_a_model_is_loaded(tmp_path):
    for folder, reason in (
        (tmp_path, "holds no pictures"),
        (tmp_path / "no", "there is no folder"),
    ):
        with pytest.raises(UserError, match=reason):
            caption_folder(folder, "someone/not-here", CaptionSettings())


def test_masks_beside_their_photos_get_no_caption(photos, blip, monkeypatch, capsys):
    """It would be the caption of no picture when they are masks."""
    scene(0).save(photos / "0-masklabel.png")
    assert script(monkeypatch, photos, "--model", blip) == 0
    assert "0-masklabel.txt" not in texts(photos)
    assert "1 are named like the masks of others, and get none" in capsys.readouterr().out
    config = DataConfig(instance_data_dir=photos, mask_dir=photos)
    assert load_instance_pictures(config)[0].mask is not None
