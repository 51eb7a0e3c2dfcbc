"""Class pictures: which are drawn, which are used, and how several runs share a folder."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image

from trainers import class_pictures
from trainers.class_pictures import claim_names, prepare_class_pictures
from trainers.config import DreamBoothConfig
from trainers.config.loading import validate
from trainers.data.intake import Intake

DIGESTS = {"unet": "1" * 64, "vae": "2" * 64}


@pytest.fixture
def drawn(monkeypatch):
    """The prompts of all pictures that a stand-in for the pipeline drew, with their numbers."""
    prompts = []

    def draw(family, prompt, validation, number, size, encode):
        prompts.append((prompt, number))
        color = (sum(prompt.encode()) % 256, number, int(validation.guidance_scale))
        return Image.new("RGB", size, color)

    monkeypatch.setattr(class_pictures, "sample_picture", draw)
    return prompts


@pytest.fixture
def prepare(drawn, tmp_path):
    """A function: overrides, digests of the base -> the run's class pictures by file name."""
    accelerator = Accelerator(cpu=True)

    def call(*overrides, digests=DIGESTS, sizes=None, **data):
        data = {"class_prompt": "a dog", "num_class_images": 3, "resolution": 16} | data
        tree = {"data": {"class_data_dir": str(tmp_path / "class"), "cache": False, **data}}
        tree["output_dir"] = str(tmp_path / "run")
        for section, values in overrides:
            tree.setdefault(section, {}).update(values)
        config, _ = validate(tree)
        assert isinstance(config, DreamBoothConfig)
        family = SimpleNamespace(
            digests=lambda folder: digests,
            max_sequence_length=0,
            denoiser_name="unet",
            text_encoder_names=(),
            load=lambda *names: None,
            apply_memory_options=lambda: None,
            unload=lambda: None,
        )
        encoder = SimpleNamespace(
            family=family,
            cache=SimpleNamespace(folder=tmp_path / "cache"),
            loaded_encoders=(),
            encoder_outputs=None,
        )
        side = config.data.max_resolution
        sizes = sizes or {(side, side): 1}
        pictures = prepare_class_pictures(encoder, sizes, config, accelerator, Intake())
        return {os.path.basename(p.name): (p.digest, p.caption) for p in pictures}

    return call


OTHERS = {
    "prompt": {"class_prompt": "a cat"},
    "prompts": {"class_prompt": ["a dog", "a cat"]},
    "base": {"digests": {**DIGESTS, "unet": "3" * 64}},
    "size": {"resolution": 32},
}
SETTINGS = {
    "steps": ("validation", {"num_inference_steps": 7}),
    "guidance": ("validation", {"guidance_scale": 3.0}),
    "negative prompt": ("validation", {"negative_prompt": "blurred"}),
    "quantization": ("model", {"quantization": "nf4"}),
}


@pytest.mark.parametrize("what", [*OTHERS, *SETTINGS])
def test_a_run_with_other_facts_draws_its_own_and_leaves_those_that_are_there(
    prepare, drawn, tmp_path, capsys, what
):
    first = prepare()
    before = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    second = prepare(*([SETTINGS[what]] if what in SETTINGS else []), **OTHERS.get(what, {}))
    assert len(drawn) == 6
    assert not first.keys() & second.keys()
    assert "3 more were drawn for other runs and are not used" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert before.items() <= after.items()
    prompts = OTHERS.get(what, {}).get("class_prompt", "a dog")
    if isinstance(prompts, str):
        assert {caption for _, caption in second.values()} == {prompts}
    # both find their own again
    assert prepare() == first
    assert len(drawn) == 6


def test_what_does_not_decide_the_pictures_draws_none_anew(prepare, drawn):
    first = prepare()
    more = prepare(("optimizer", {"learning_rate": 1e-3}), num_class_images=5)
    assert first.items() < more.items()
    assert [number for _, number in drawn] == [0, 1, 2, 3, 4]


def test_class_pictures_have_the_sizes_of_the_photos_in_proportion(prepare, drawn, tmp_path):
    def sizes(names):
        found = []
        for name in names:
            with Image.open(tmp_path / "class" / name) as image:
                found.append(image.size)
        return sorted(found)

    first = prepare(sizes={(24, 16): 4, (16, 24): 2}, num_class_images=6)
    assert sizes(first) == [(16, 24)] * 2 + [(24, 16)] * 4
    # another photo: nothing is drawn anew but what is missing
    second = prepare(sizes={(24, 16): 4, (16, 24): 4}, num_class_images=6)
    assert sizes(second) == [(16, 24)] * 3 + [(24, 16)] * 3
    assert len(drawn) == 7
    assert len(first.items() & second.items()) == 5


def test_what_is_lost_is_drawn_again_under_its_name_and_nothing_else(prepare, drawn, tmp_path):
    first = prepare(class_prompt=["a dog", "a cat"])
    (tmp_path / "class" / "class-00001.png").unlink()
    (tmp_path / "class" / "class-00002.txt").unlink()
    assert prepare(class_prompt=["a dog", "a cat"]) == first
    assert drawn[3:] == [("a cat", 1)]
    assert [caption for _, caption in first.values()] == ["a dog", "a cat", "a dog"]


def test_the_users_own_pictures_are_used_as_they_are_and_counted(prepare, drawn, tmp_path, capsys):
    folder = tmp_path / "class"
    folder.mkdir()
    for name in ("class-00000.png", "rex.png"):
        Image.new("RGB", (9, 9), "red").save(folder / name)
    (folder / "rex.txt").write_text("a red dog")
    own = {name: (folder / name).read_bytes() for name in ("class-00000.png", "rex.png", "rex.txt")}
    pictures = prepare(num_class_images=4)
    assert "2 of your own and 2 drawn by the base" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in own} == own
    assert [pictures[name][1] for name in ("class-00000.png", "rex.png")] == ["a dog", "a red dog"]
    assert len(pictures) == 4
    assert len(drawn) == 2
    # another run takes them too, and none of those that were drawn
    other = prepare(num_class_images=4, class_prompt="a cat")
    assert set(own) & other.keys() == set(own) & pictures.keys()
    assert len(other.keys() & pictures.keys()) == 2


def test_enough_pictures_of_the_users_own_need_no_base(prepare, drawn, tmp_path):
    (tmp_path / "class").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / "class" / f"{i}.png")
    assert list(prepare()) == ["0.png", "1.png", "2.png"]
    assert not drawn
    assert not list((tmp_path / "class").glob("*.json"))


@pytest.mark.parametrize("content", ["null", "[", '{"drawn_from": null}', "\udcff"])
def test_a_file_that_says_nothing_of_a_set_makes_pictures_the_users_own(prepare, tmp_path, content):
    prepare()
    path = tmp_path / "class" / "class-pictures.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert list(prepare(class_prompt="a cat")) == [f"class-0000{i}.png" for i in range(3)]


def test_the_set_says_what_it_was_drawn_from(prepare, tmp_path):
    prepare()
    (path,) = (tmp_path / "class").glob("*.json")
    facts = json.loads(path.read_text())["drawn_from"]
    assert facts["prompts"] == ["a dog"]
    assert facts["base_files"] == DIGESTS
    assert {"resolution", "num_inference_steps", "guidance_scale", "seed"} <= facts.keys()


def test_of_runs_that_begin_at_once_one_has_the_plain_names_and_none_has_anothers(tmp_path):
    facts = [{"prompts": [str(i % 4)]} for i in range(16)]
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        with ThreadPoolExecutor(16) as pool:
            endings = list(pool.map(lambda fact, at=folder: claim_names(at, fact), facts))
        assert len(set(endings)) == 4
        assert "" in endings
        assert all(endings[i] == endings[i % 4] for i in range(16))
        assert not list(folder.glob(".*"))


def test_a_disk_without_links_can_hold_class_pictures(prepare, monkeypatch):
    def link(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(class_pictures.os, "link", link)
    assert list(prepare()) == [f"class-0000{i}.png" for i in range(3)]
