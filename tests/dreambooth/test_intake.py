"""What was found in the user's folders, and what was not used, is said before training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFilter

from tests.shared.messy_folder import scene
from trainers import dreambooth, evaluate
from trainers.config import DataConfig, DreamBoothConfig
from trainers.data.buckets import BucketRule
from trainers.data.intake import INTAKE_NAME, Intake, check_batch_size
from trainers.data.photo_checks import check_lengths, load_photos
from trainers.data.photo_sets import load_class_pictures, load_instance_pictures
from trainers.errors import UserError
from trainers.run import run


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


def notes(tmp_path, train=None, num_processes=1, **keys):
    """The notes of a run on the folder of photos, and those of them that are warnings."""
    data = {"instance_data_dir": tmp_path / "photos", "instance_prompt": "p", "resolution": 8}
    config = DreamBoothConfig(data={**data, **keys}, train=train or {})
    processes, rule = SimpleNamespace(num_processes=num_processes), BucketRule.from_config(config)
    intake, _, _ = load_photos(config, processes, rule)
    warnings = [note.text for note in intake.notes if note.level == "warning"]
    return "\n".join(note.text for note in intake.notes), "\n".join(warnings)


def test_plain_photos_give_no_warning(put, tmp_path):
    put("0.png"), put("1.png"), put(".DS_Store", content=b"x"), put("Thumbs.db", content=b"x")
    found, warnings = notes(tmp_path)
    assert warnings == ""
    assert "2 pictures in photos, captions: 2 by prompt" in found
    assert "DS_Store" not in found
    assert "Thumbs" not in found


def test_captions_are_counted_by_where_they_stand(put, tmp_path):
    for i in range(6):
        put(f"{i}.png")
    put("0.txt", content=b"a dog")
    line = '{"file_name": "%d.png", "text": "a dog"}'
    put("metadata.jsonl", content="\n".join(line % i for i in range(3)).encode())
    found, _ = notes(tmp_path)
    for count in ("1 by text files", "2 by metadata.jsonl", "3 by prompt"):
        assert count in found
    assert "the text file is used (0.png)" in found


# Photos


def test_one_photo_is_a_warning(put, tmp_path):
    put("0.png")
    assert "there is one picture" in notes(tmp_path)[1]


def test_the_same_photo_twice_is_a_warning_whatever_file_holds_it(put, tmp_path):
    with Image.open(put("0.png")) as image:
        image.save(tmp_path / "photos/copy.bmp")
    put("1.png")
    assert (
        "the same picture more than once, so it counts more: copy.bmp = 0.png" in notes(tmp_path)[1]
    )


def test_a_photo_smaller_than_the_resolution_is_a_warning(put, tmp_path):
    put("0.png", (9, 9)), put("1.png", (20, 7))
    warnings = notes(tmp_path, center_crop=False)[1]
    assert "smaller than data.resolution=8, so enlarged: 1.png (20 x 7)" in warnings


@pytest.mark.parametrize(
    ("size", "level"), [((10, 10), ""), ((12, 8), "note"), ((16, 9), "warning")]
)
def test_what_the_crop_leaves_out_is_said_as_a_share(put, tmp_path, size, level):
    put("0.png", size), put("1.png", (10, 10))
    (found, warnings), share = notes(tmp_path, buckets=False), 1 - min(size) / max(size)
    text = f"lose {share / 2:.0%} on average and up to {share:.0%} (0.png)"
    assert (text in found) == bool(level)
    assert (text in warnings) == (level == "warning")
    assert "lose" not in notes(tmp_path, center_crop=False, buckets=False)[0]


def test_what_no_bucket_can_hold_is_said_as_a_share(put, tmp_path):
    put("0.png", (600, 100)), put("1.png", (300, 200))
    found, warnings = notes(tmp_path, resolution=128)
    # 6 to 1 is cut to 4 to 1
    assert "more than 4 times as long as wide" in found
    assert "up to 33% (0.png)" in found
    assert "lose" not in warnings
    assert "are learnt as 152 x 104 (1), 256 x 64 (1)" in found
    put("0.png", (44, 64))
    assert "of a shape between those of the sizes, pictures" in notes(tmp_path, resolution=32)[0]


def test_a_photo_that_may_not_be_enlarged_so_far_is_a_warning(put, tmp_path):
    put("0.png", (60, 60)), put("1.png", (100, 100))
    warnings = notes(tmp_path, resolution=128, max_upscale=1.6)[1]
    assert (
        "too small for data.resolution=128 by data.max_upscale=1.6: 0.png (60 x 60) as" in warnings
    )
    assert "1.png" not in warnings.split("too small")[1]


@pytest.mark.parametrize(
    ("train", "num_processes"),
    [
        ({"train_batch_size": 3}, 1),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 3}, 1),
        ({"train_batch_size": 1}, 3),
    ],
)
def test_a_batch_larger_than_the_photos_is_a_warning(put, tmp_path, train, num_processes):
    put("0.png"), put("1.png")
    warnings = notes(tmp_path, train, num_processes)[1]
    assert "a step learns from 3 pictures" in warnings
    assert "there are 2" in warnings


def test_an_animation_is_a_warning(put, tmp_path):
    put("0.png"), put("1.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "photos/2.gif", save_all=True, append_images=frames[1:])
    assert "of several frames or pages the first is used: 2.gif" in notes(tmp_path)[1]


def test_photos_that_are_learnt_from_cannot_be_held_out(put, tmp_path):
    with Image.open(put("0.png")) as image:
        put("1.png")
        (tmp_path / "held").mkdir()
        image.save(tmp_path / "held/other.bmp")
    with pytest.raises(UserError, match=r"data\.held_out_dir: .*other\.bmp = 0\.png"):
        notes(tmp_path, held_out_dir=tmp_path / "held")
    config = DataConfig(instance_data_dir=tmp_path / "photos", instance_prompt="p")
    with pytest.raises(UserError, match=r"other\.bmp is not held out"):
        evaluate.load_held_out_photos(tmp_path / "held", load_instance_pictures(config))


def test_nearly_equal_and_blurred_photos_are_warnings_before_the_training(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene(1).save(folder / "0.png")
    scene(1).resize((120, 90)).save(folder / "1.jpg", quality=50)
    scene(2).save(folder / "2.png")
    assert (
        "nearly the same picture more than once, so it counts more: 1.jpg = 0.png"
        in (notes(tmp_path)[1])
    )
    assert "blurred" not in notes(tmp_path)[1]
    scene(3).filter(ImageFilter.GaussianBlur(4)).save(folder / "3.png")
    assert "blurred, and blur is learnt too: 3.png" in notes(tmp_path)[1]


def test_an_equal_photo_is_not_said_to_be_nearly_equal_too(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene(1).save(folder / "0.png")
    scene(1).save(folder / "1.bmp")
    warnings = notes(tmp_path)[1]
    assert "the same picture more than once, so it counts more: 1.bmp = 0.png" in warnings
    assert "nearly" not in warnings


@pytest.mark.filterwarnings("ignore:skipped")
def test_unreadable_photos_that_are_left_out_are_counted(put, tmp_path):
    put("0.png"), put("1.png"), put("2.png", content=b"x")
    warnings = notes(tmp_path, skip_corrupt=True)[1]
    assert warnings == "1 unreadable pictures are left out (data.skip_corrupt)"


def test_how_often_a_photo_counts_belongs_to_what_a_resumed_run_compares(settings, put, tmp_path):
    put("2_a/0.png", (16, 16)), put("1_b/1.png", (16, 16))
    folder = tmp_path / "photos"
    config = settings(f"data.instance_data_dir={folder}")
    before = dreambooth.build(config, Accelerator(cpu=True))[2]
    (folder / "2_a").rename(folder / "3_a")
    assert dreambooth.build(config, Accelerator(cpu=True))[2] != before


def test_class_pictures_that_are_not_used_are_counted(put, tmp_path):
    for i in range(3):
        put(f"{i}.png")
    intake = Intake()
    config = DataConfig(class_prompt="a dog", num_class_images=2)
    load_class_pictures(tmp_path / "photos", config.sets[0], config, intake=intake)
    assert any("of 3 class pictures 2 are used" in note.text for note in intake.notes)


# Lengths of captions


class Words:
    """Text encoders that read so many words."""

    def __init__(self, **lengths):
        self.lengths, self.text_encoder_names = lengths, list(lengths)

    def count_tokens(self, name, prompt):
        words, limit = prompt.split(), self.lengths[name]
        return len(words), limit, " ".join(words[limit:])


def test_a_caption_that_no_encoder_reads_to_its_end_is_a_warning_with_the_lost_words():
    intake = Intake()
    check_lengths(
        intake, Words(a=3, b=4), "captions", {"on the grass a sks dog": "0.png", "x": "1"}
    )
    (note,) = intake.notes
    assert note.level == "warning"
    assert "0.png (6 tokens, and b reads 4; not read: 'sks dog')" in note.text


def test_a_caption_that_another_encoder_reads_is_a_note():
    intake = Intake()
    check_lengths(intake, Words(a=3, b=9), "captions", {"on the grass a sks dog": "0.png"})
    (note,) = intake.notes
    assert note.level == "note"
    assert "1 by a, which reads 3 tokens" in note.text


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_families_count_tokens_as_their_tokenizers_cut_them(bases, settings, family):
    from trainers.efficiency.apply import open_family

    config = settings(family=family)
    base = open_family(config.model, Accelerator(cpu=True).device, torch.float32)
    base.load()
    for name in base.text_encoder_names:
        assert base.count_tokens(name, "a b")[2] == ""
        total, limit, rest = base.count_tokens(name, "a b c d e f g h i j k l m n o p sks")
        assert limit == len(base.tokenize(name, "a")) < total
        assert rest.replace(" ", "").endswith("sks")
        # here a token of CLIP is a letter
        if name in base.clip_encoders:
            assert len(rest.replace(" ", "")) == total - limit


# The report


def test_a_run_says_it_first_and_keeps_it(settings, put, tmp_path, capsys):
    put("0.png", (16, 16)), put("1.png", (20, 16)), put("2.nef", content=b"x")
    put("0.txt", content=b"on the green grass a sks dog")
    folder = f"data.instance_data_dir={tmp_path / 'photos'}"
    config = settings(folder, "train.max_train_steps=1")
    dreambooth.build(config, Accelerator(cpu=True))
    printed = capsys.readouterr().out
    kept = json.loads((config.output_dir / INTAKE_NAME).read_text())
    assert {note["level"] for note in kept} == {"note", "warning"}
    for note in kept:
        assert note["text"] in printed
    assert "data: warning: not used: 1 .nef (2.nef)" in printed
    assert "0.png (24 tokens, and text_encoder reads 12; not read: " in printed
    assert str(tmp_path) not in json.dumps(kept)


def test_strict_makes_warnings_errors_before_anything_is_trained(settings, put, tmp_path):
    put("0.png", (16, 16)), put("1.png", (16, 16)), put("2.nef", content=b"x")
    folder = f"data.instance_data_dir={tmp_path / 'photos'}"
    config = settings(folder, "data.strict=true", "train.train_batch_size=1")
    with pytest.raises(UserError, match=r"(?s)data\.strict is true.*not used: 1 \.nef \(2\.nef\)"):
        run(config)
    assert not (config.output_dir / "checkpoints").exists()


def test_a_note_is_said_once(capsys):
    intake = Intake()
    intake.note("a"), intake.note("a")
    intake.report(print)
    intake.warn("b")
    intake.report(print)
    assert capsys.readouterr().out == "data: a\ndata: warning: b\n"


def test_a_batch_as_large_as_the_set_is_no_warning():
    intake, train = Intake(), DreamBoothConfig().train.model_copy(update={"train_batch_size": 4})
    check_batch_size(intake, train, 1, 4)
    assert intake.notes == []
