"""Before a run trains, one page tells what becomes of every file, whatever is wrong with some."""

import re
import runpy
import sys

import pytest
from PIL import Image

from tests.shared.messy_folder import LEARNT, scene, write_messy_folder
from tests.shared.photo_pages import Cells, outcomes
from trainers.config import DataConfig
from trainers.data.crops import choose_crop
from trainers.errors import UserError
from trainers.inspection import inspect_photos
from trainers.publishing.photo_page import write_photo_page


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A messy folder, and what is to be said of each of its files."""
    folder = tmp_path_factory.mktemp("messy") / "photos"
    return folder, write_messy_folder(folder)


@pytest.fixture
def inspect(settings, tmp_path):
    """A function: folder, overrides -> the inspection and the source of its page."""

    def run(folder, *overrides):
        config = settings(f"data.instance_data_dir={folder}", *overrides)
        inspection = inspect_photos(config)
        page = write_photo_page(inspection, config, tmp_path / "out" / "page.html")
        return inspection, page.read_text("utf-8")

    return run


def one_photo(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene(1).save(folder / "1.png")
    return folder


@pytest.mark.parametrize("skips", [False, True])
def test_every_file_of_a_messy_folder_is_listed_with_what_becomes_of_it(messy, inspect, skips):
    folder, expected = messy
    assert len(expected) >= 40
    inspection, source = inspect(folder, f"data.skip_corrupt={str(skips).lower()}")
    told = outcomes(source)
    wrong = {
        name: told.get(name) for name, text in expected.items() if text not in told.get(name, "")
    }
    assert wrong == {}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    folders = {"more", "3_sks dog", "0_sks dog"}
    assert {name for name in there if not name.startswith("run/")} - folders == told.keys()
    # a photo is shown if it is learnt, and no other is
    learnt = [name for name, text in told.items() if text.startswith(LEARNT)]
    assert sorted(Cells(source).names) == sorted(learnt)
    assert len(inspection.photos["learnt"]) == len(learnt) > 20


def test_all_errors_are_told_with_the_files_that_have_them(messy, inspect):
    errors = inspect(messy[0])[0].texts("error")
    for name in ("d.txt", "e.txt", "nobody.txt", "u half.jpg", "v empty.png", "pipe.png", "0_sks"):
        assert sum(name in error for error in errors) == 1, name
    skipping = inspect(messy[0], "data.skip_corrupt=true")[0].texts("error")
    assert not any("half" in error for error in skipping)
    assert any("d.txt" in error for error in skipping)


def test_a_folder_without_any_usable_photo_has_a_page_too(inspect, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"x")
    inspection, source = inspect(folder)
    assert len(inspection.texts("error")) == 2
    assert "none of its 1 pictures can be read" in inspection.texts("error")[1]
    assert "not a readable picture" in outcomes(source)["1.png"]


def test_photos_without_captions_are_missing_nothing_else(inspect, tmp_path):
    inspection, source = inspect(one_photo(tmp_path), "data.instance_prompt=null")
    (error,) = inspection.texts("error")
    assert error.startswith("no caption for 1.png in photos: set data.instance_prompt")
    assert "1 pictures in photos, captions: 1 missing" in inspection.texts("note")
    assert "not used: no caption" in outcomes(source)["1.png"]


def test_what_is_like_another_photo_or_blurred_is_said_of_it(messy, inspect):
    photos = {p.name: p.remarks for p in inspect(messy[0])[0].photos["learnt"]}
    assert photos["c.png"] == ["the same as c copy.bmp"]
    assert photos["c smaller.jpg"][0] == "nearly the same as c copy.bmp"
    assert any("blurred" in remark for remark in photos["t blurred.png"])
    assert any("several frames" in remark for remark in photos["i moving.gif"])
    assert photos["d.webp"] == []


def test_the_page_fetches_nothing_and_no_name_becomes_markup(messy, inspect):
    _, source = inspect(messy[0])
    assert not re.search(r"(?:src|href)=\"(?!data:)", source)
    assert "<script" not in source
    assert "<b>&amp;.png" not in source
    assert "url(" not in source


@pytest.mark.parametrize("buckets", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_the_rectangle_on_a_photo_is_what_the_run_cuts_out(inspect, tmp_path, buckets, center):
    folder = tmp_path / "photos"
    folder.mkdir()
    image = scene(1, (110, 64))
    image.save(folder / "1.png")
    keys = {"buckets": buckets, "center_crop": center, "resolution": 32}
    overrides = [f"data.{key}={value}" for key, value in keys.items()]
    (photo,) = inspect(folder, *overrides)[0].photos["learnt"]
    data = DataConfig(instance_data_dir=folder, **keys)
    shown, cut = set(), set()
    for view in photo.views:
        # the sides of the resized picture, of which the view has a share
        size = [round(side / share) for side, share in zip(view.size, view.shares, strict=True)]
        left, top = round(view.left * size[0]), round(view.top * size[1])
        whole = image.resize(size, Image.Resampling.LANCZOS)
        box = (left, top, left + view.size[0], top + view.size[1])
        shown.add(whole.crop(box).tobytes())
    for variant in range(data.num_variants):
        pixels = choose_crop(photo.picture, variant, view.size, data)(image)
        cut.add(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes())
    assert shown == cut
    # several crops may be alike
    assert len(shown) == len(photo.views) == 1 if center else len(photo.views) > 1
    assert view.size == ((40, 24) if buckets else (32, 32))
    assert photo.cut_off == pytest.approx(0.03 if buckets else 0.42, abs=0.01)


def test_a_photo_is_shown_at_each_area_that_it_is_trained_at(inspect, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene(1, (96, 64)).save(folder / "large.png")
    scene(2, (24, 16)).save(folder / "small.png")
    inspection, _ = inspect(folder, "data.resolution=[16,64]", "train.max_train_steps=15")
    photos = {photo.name: photo for photo in inspection.photos["learnt"]}
    assert [len(photos[name].views) for name in ("large.png", "small.png")] == [2, 1]
    # 15 steps of 2 rows; a photo is drawn at each of its sizes alike
    assert photos["large.png"].visits == pytest.approx(20)
    assert photos["small.png"].visits == pytest.approx(10)


def test_a_photo_that_is_too_small_for_any_size_is_an_error_and_the_others_are_shown(
    inspect, tmp_path
):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene(1, (96, 64)).save(folder / "large.png")
    scene(2, (9, 7)).save(folder / "tiny.png")
    inspection, source = inspect(folder, "data.resolution=64")
    assert [photo.name for photo in inspection.photos["learnt"]] == ["large.png"]
    assert any("tiny.png has 9 x 7 pixels, too few" in text for text in inspection.texts("error"))
    assert "not used: tiny.png has 9 x 7 pixels" in outcomes(source)["tiny.png"]


def test_how_often_photos_are_seen_is_shared_by_how_often_they_count(inspect, tmp_path):
    for name, seed in (("3_a/1.png", 1), ("1_b/2.png", 2)):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True)
        scene(seed).save(path)
    train = "train.gradient_accumulation_steps=2"
    photos = {p.name: p for p in inspect(tmp_path / "photos", train)[0].photos["learnt"]}
    # six steps of 2 x 2 rows
    assert photos["3_a/1.png"].visits == pytest.approx(18)
    assert photos["1_b/2.png"].visits == pytest.approx(6)


def test_the_part_of_a_caption_that_is_not_read_is_marked(inspect, tmp_path):
    folder = one_photo(tmp_path)
    # a token of this tokenizer is a letter, and two of the twelve are marks
    (folder / "1.txt").write_text("abcd Efgh ij klm nop")
    inspection, source = inspect(folder)
    (photo,) = inspection.photos["learnt"]
    assert photo.readings[0].parts == ("abcd Efgh ij ", "", "klm nop")
    assert photo.readings[0].tokens == {"text_encoder": (18, 12)}
    assert "<del>klm nop</del>" in source
    assert "no text encoder reads its caption to the end" in photo.remarks


def test_each_of_several_captions_is_shown_as_the_run_completes_it(inspect, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        scene(i).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("a {trigger}\nthe {trigger}")
    keys = ("data.caption_lines=choose", "data.caption_prefix=p")
    inspection, source = inspect(folder, *keys, "data.trigger=sks")
    readings = inspection.photos["learnt"][0].readings
    assert [reading.caption for reading in readings] == ["p a sks", "p the sks"]
    assert source.count("sks”") == 2
    # without a trigger the place for it is an error of that photo alone
    inspection, source = inspect(folder, *keys)
    assert [photo.name for photo in inspection.photos["learnt"]] == ["1.png"]
    assert "has a place for the trigger word" in outcomes(source)["0.png"]


def test_what_one_of_several_encoders_reads_is_marked_as_such(settings, tmp_path):
    folder = one_photo(tmp_path)
    (folder / "1.txt").write_text("abcdefghijklmnop")
    config = settings(
        f"data.instance_data_dir={folder}", "model.max_sequence_length=40", family="sd3"
    )
    (photo,) = inspect_photos(config).photos["learnt"]
    read, some, unread = photo.readings[0].parts
    assert (read, some, unread) == ("abcdefghij", "klmnop", "")
    assert not photo.remarks


def test_without_the_base_model_everything_else_is_told(inspect, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = one_photo(tmp_path)
    base = "model.pretrained_model_name_or_path=someone/not-here"
    inspection, source = inspect(folder, base)
    assert any("tokens are not counted" in text for text in inspection.texts("note"))
    assert inspection.photos["learnt"][0].readings[0].tokens == {}
    assert "a b c" in source


def test_class_pictures_of_the_users_own_are_shown_and_the_others_counted(inspect, tmp_path):
    for name, seed in (("photos/1.png", 1), ("class/2.png", 2)):
        path = tmp_path / name
        path.parent.mkdir()
        scene(seed).save(path)
    inspection, _ = inspect(
        tmp_path / "photos",
        f"data.class_data_dir={tmp_path / 'class'}",
        "data.class_prompt=c",
        "data.num_class_images=3",
    )
    (photo,) = inspection.photos["of the class"]
    assert photo.name == "2.png"
    # six steps of two rows, a third of them by this picture
    assert photo.visits == pytest.approx(4)
    assert "class pictures: the base draws 2 when the run starts" in inspection.texts("note")


def test_held_out_photos_that_are_learnt_from_are_an_error_and_shown(inspect, tmp_path):
    for name in ("photos/1.png", "held/1.png"):
        path = tmp_path / name
        path.parent.mkdir()
        scene(1).save(path)
    inspection, _ = inspect(tmp_path / "photos", f"data.held_out_dir={tmp_path / 'held'}")
    assert len(inspection.photos["held out"]) == 1
    assert any("learnt from" in text for text in inspection.texts("error"))


def script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, words)])
    return runpy.run_path("scripts/inspect_data.py")["main"]()


def test_the_script_writes_the_page_and_its_status_tells_of_errors(
    settings, messy, tmp_path, monkeypatch, capsys
):
    folder = f"data.instance_data_dir={messy[0]}"
    settings(folder)
    page = tmp_path / "page.html"
    assert script(monkeypatch, tmp_path / "config.yaml", folder, "--output", page) == 2
    assert page.is_file()
    printed = capsys.readouterr().out
    assert "error: " in printed
    assert printed.rstrip().endswith("page.html")
    good = tmp_path / "good"
    good.mkdir()
    scene(1).save(good / "1.png")
    page.unlink()
    folder = f"data.instance_data_dir={good}"
    assert script(monkeypatch, tmp_path / "config.yaml", folder, "--text") == 0
    assert not page.exists()


def test_a_run_of_another_kind_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("kind: gan\ndata: {image_dir: .}\ntrain: {train_batch_size: 2}\n")
    with pytest.raises(UserError, match="a run of gan"):
        script(monkeypatch, path)
