"""The names of concepts, of their folders, and of photos that are called alike."""

import shutil
import unicodedata

import pytest
from PIL import Image

from trainers.config import DataConfig
from trainers.data.intake import Intake
from trainers.data.photo_checks import check_duplicates
from trainers.data.photo_sets import load_instance_pictures
from trainers.errors import UserError


@pytest.fixture
def two(tmp_path):
    """A function: keys of both concepts -> the data section of a dog and a cat."""

    def make(dog=None, cat=None):
        listed = [{"name": "rex", "instance_prompt": "p"} | (dog or {})]
        listed.append({"name": "tom", "instance_prompt": "p"} | (cat or {}))
        for i, concept in enumerate(listed):
            folder = tmp_path / concept.pop("folder", f"photos {i}")
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(folder / "0.png")
            concept["instance_data_dir"] = folder
        return DataConfig(concepts=listed, resolution=8)

    return make


@pytest.mark.parametrize("name", ["café", "cafe\u0301", "हिन्दी", "猫" * 66, "Straße-1 a"])
def test_names_may_be_of_any_script(two, name, tmp_path):
    (photos, _) = two({"name": name}).sets
    (tmp_path / photos.name).mkdir()
    assert photos.name == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize(("repeats", "is_said"), [(1, True), (2, False)])
def test_the_number_of_the_folder_that_a_concept_names_is_said_not_to_count(two, repeats, is_said):
    intake, data = Intake(), two(cat={"folder": "9_zwx cat", "repeats": repeats})
    pictures = load_instance_pictures(data, intake)
    assert {p.repeats for p in pictures if p.concept == "tom"} == {repeats}
    said = "tom: the number of 9_zwx cat is not read"
    assert any(note.text.startswith(said) for note in intake.notes) == is_said


def test_photos_of_one_name_are_told_apart(two):
    intake, data = Intake(), two()
    first, second = (photos.instance_data_dir for photos in data.sets)
    shutil.copy(first / "0.png", second / "0.png")
    check_duplicates(intake, load_instance_pictures(data, intake), [])
    assert any(note.text.endswith(": tom: 0.png = rex: 0.png") for note in intake.notes)


LISTED = "data.concepts=[{name: rex a, instance_data_dir: .}, {instance_data_dir: .}]"
NOTHING = ("data.instance_data_dir=null", "data.instance_prompt=null", LISTED)


def test_an_override_names_a_concept_as_messages_do(settings):
    given = ("data.concepts[rex a].repeats=3", "data.concepts[concept-2].trigger=zwx")
    first, second = settings(*NOTHING, *given).data.concepts
    assert (first.repeats, first.trigger, second.repeats, second.trigger) == (3, None, 1, "zwx")
    for override, told in (
        ("data.concepts[tom].repeats=3", "concepts has none named tom, it has rex a, concept-2"),
        (
            "data.concepts.repeats=3",
            "concepts is a list: name one of it, as concepts[NAME].repeats",
        ),
        ("data.concepts[rex a].repaets=3", "data.concepts[rex a].repaets: unknown key; did you"),
    ):
        with pytest.raises(UserError) as caught:
            settings(*NOTHING, override)
        assert told in str(caught.value)
