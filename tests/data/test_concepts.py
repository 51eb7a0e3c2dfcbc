"""Several sets of pictures in one run: each has its own prompts, and counts as it is told."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.shared.fake_pictures import fake
from trainers.config import DataConfig, DreamBoothConfig
from trainers.data.buckets import (
    BucketRule,
    choose_factors,
    class_shares,
    concept_shares,
    make_buckets,
    share_error,
    sizes_by_concept,
)
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.intake import Intake
from trainers.data.photo_checks import check_photos
from trainers.data.photo_sets import load_held_out_pictures, load_instance_pictures
from trainers.data.sampler import BatchSlice
from trainers.errors import UserError

SQUARES = BucketRule((8,), 8, enabled=False)


@pytest.fixture
def photos(tmp_path):
    """A function that writes a folder with so many pictures, each of its own noise."""
    random = np.random.default_rng(0)

    def write(name, count):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            array = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(array).save(folder / f"{i}.png")
        return folder

    return write


@pytest.fixture
def two(photos):
    """A function: keys of both concepts -> the data section of a dog and a cat."""

    def make(dog=None, cat=None, **common):
        dog = {"name": "rex", "instance_data_dir": photos("rex", 4)} | (dog or {})
        cat = {"name": "tom", "instance_data_dir": photos("tom", 2)} | (cat or {})
        prompts = {"rex": "a sks dog", "tom": "a zwx cat"}
        concepts = [{"instance_prompt": prompts.get(c["name"])} | c for c in (dog, cat)]
        return DataConfig(concepts=concepts, resolution=8, **common)

    return make


def test_each_picture_has_the_prompt_of_its_concept_unless_it_has_a_caption(two, tmp_path):
    config = two()
    (tmp_path / "tom/1.txt").write_text("a cat asleep")
    captions = [(p.concept, p.caption) for p in load_instance_pictures(config)]
    assert captions == [("rex", "a sks dog")] * 4 + [("tom", "a zwx cat"), ("tom", "a cat asleep")]


def test_each_concept_has_its_trigger_or_that_of_all(two, tmp_path):
    config = two(
        {"instance_prompt": "a [trigger] dog", "trigger": "sks"},
        {"instance_prompt": "a {trigger} cat"},
        trigger="zwx",
        caption_suffix=", drawn",
    )
    (tmp_path / "rex/1.txt").write_text("[trigger] asleep")
    captions = {p.caption for p in load_instance_pictures(config)}
    assert captions == {"a sks dog, drawn", "sks asleep, drawn", "a zwx cat, drawn"}
    assert config.instance_prompts == ["a sks dog", "a zwx cat"]
    assert config.triggers == ["sks", "zwx"]
    lacking = problems(two({"instance_prompt": "a [trigger] dog"}))
    assert "has a place for the trigger" in lacking["data.concepts[rex].trigger"]
    comma = problems(two({"trigger": "a, b"}))
    assert "has a comma" in comma["data.concepts[rex].trigger"]


def test_the_flat_keys_are_one_set_without_a_name(photos):
    keys = {"instance_data_dir": photos("rex", 3), "instance_prompt": "a sks dog"}
    flat, listed = DataConfig(**keys), DataConfig(concepts=[{"name": "a", **keys}])
    one, other = load_instance_pictures(flat), load_instance_pictures(listed)
    assert [(p.name, p.caption, p.repeats) for p in one] == [
        (p.name, p.caption, p.repeats) for p in other
    ]
    assert {p.concept for p in one} == {""}


def test_repeats_multiply_those_of_kohyas_folders(photos):
    photos("dogs/2_sks dog", 1), photos("dogs/1_zwx dog", 1)
    folder = photos("dogs", 0)
    config = DataConfig(concepts=[{"instance_data_dir": folder, "repeats": 3}])
    found = {p.caption: p.repeats for p in load_instance_pictures(config)}
    assert found == {"sks dog": 6, "zwx dog": 3}


def test_a_concept_within_the_folder_of_another_belongs_to_one(photos):
    folder = photos("all", 2)
    inner = photos("all/cat", 3)
    concepts = [
        {"name": name, "instance_data_dir": place, "instance_prompt": name}
        for name, place in (("dog", folder), ("cat", inner))
    ]
    found = Counter(p.concept for p in load_instance_pictures(DataConfig(concepts=concepts)))
    assert found == {"dog": 2, "cat": 3}


def test_held_out_pictures_are_those_of_every_concept(two, photos):
    config = two({"held_out_dir": photos("held", 1)}, {"held_out_dir": photos("held_cats", 2)})
    found = [(p.concept, p.caption) for p in load_held_out_pictures(config)]
    assert found == [("rex", "a sks dog")] + [("tom", "a zwx cat")] * 2
    assert load_held_out_pictures(two()) == []


def test_what_is_said_names_the_concept_and_its_share(two, tmp_path):
    config = two(cat={"repeats": 2})
    (tmp_path / "tom/notes.psd").write_bytes(b"x")
    intake = Intake()
    check_photos(intake, load_instance_pictures(config, intake), [], SQUARES)
    texts = [note.text for note in intake.notes]
    assert "rex: 4 pictures in rex, captions: 4 by prompt" in texts
    assert any(text.startswith("tom: not used: 1 .psd") for text in texts)
    assert "of the pictures of a step: rex 50%, tom 50%" in texts


# How often each is visited


def visits(buckets, steps, size=4):
    """How often each picture of each pool is drawn, by name."""
    pools = [()] * len(buckets[0].pools)
    batches = DreamBoothBatches(pools, None, DataConfig(), BatchSlice(0, size), buckets)
    return Counter(name for step in range(steps) for name in batches.sample_names(step)[0])


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_every_picture_is_visited_in_proportion_to_its_repeats(two, repeats):
    pool = load_instance_pictures(two(cat={"repeats": repeats}))
    rows = 4 + 2 * repeats
    found = visits(make_buckets([pool], SQUARES), rows * 3)  # four rows a step: twelve epochs
    assert {found[p.name] for p in pool if p.concept == "rex"} == {12}
    assert {found[p.name] for p in pool if p.concept == "tom"} == {12 * repeats}


def sized(size, name, concept, repeats=1):
    return fake(name, size=size, repeats=repeats, concept=concept)


WIDE, TALL = (48, 32), (32, 48)
RULE = BucketRule((32,), 8)


@pytest.mark.parametrize("counts", [(6, 6), (4, 8), (40, 20), (7, 30)])
@pytest.mark.parametrize(
    "photos",
    [
        {("a", WIDE): 1, ("b", WIDE): 1},
        {("a", WIDE): 4, ("b", WIDE): 2},
        {("a", WIDE): 3, ("b", TALL): 5},
        {("a", WIDE): 4, ("b", WIDE): 1, ("a", TALL): 1, ("b", TALL): 6},
    ],
)
def test_class_rows_are_shared_as_the_instance_rows_are_in_each_size(counts, photos):
    instance = [
        sized(size, f"{name}{size}{i}", name)
        for (name, size), count in photos.items()
        for i in range(count)
    ]
    # class pictures of the first size alone
    pool = [
        sized(WIDE, f"class {name}{i}", name)
        for name, count in zip("ab", counts, strict=True)
        for i in range(count)
    ]
    buckets = make_buckets([instance, pool], RULE, {"a": "a", "b": "b"})
    assert len(buckets) == len({size for _, size in photos})
    for bucket in buckets:
        wanted, found = (Counter(p.concept for p in members) for members in bucket.pools)
        for name in wanted:
            share = found[name] / found.total()
            assert share == pytest.approx(wanted[name] / wanted.total(), rel=0.05)
    assert class_shares(buckets) == pytest.approx(concept_shares(instance, RULE), rel=0.05)
    seen = visits(buckets, 4 * len(instance))
    drawn = {name: sum(n for key, n in seen.items() if f"class {name}" in key) for name in "ab"}
    assert drawn["a"] / sum(drawn.values()) == pytest.approx(
        concept_shares(instance, RULE)["a"], rel=0.3
    )


def test_shares_count_each_photo_at_all_its_areas():
    """A photo that is large enough for two is drawn twice as often."""
    instance = [sized((64, 64), "large", "a"), sized((20, 20), "small", "b")]
    rule = BucketRule((32, 64), 8)
    assert concept_shares(instance, rule) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    found = visits(make_buckets([instance], rule), 12)
    assert found == {"large": 32, "small": 16}


def test_class_pictures_of_one_class_are_not_repeated():
    instance = [sized(WIDE, f"{name}{i}", name) for name in "ab" for i in range(3)]
    pool = [sized(WIDE, f"class {i}", "a") for i in range(5)]
    for class_sets in ({"a": "a", "b": "a"}, {"a": "a"}):
        (bucket,) = make_buckets([instance, pool], RULE, class_sets)
        assert bucket.pools[1] == tuple(pool)


def test_sizes_of_class_pictures_follow_those_of_their_concept():
    instance = [sized(WIDE, "0", "a", 2), sized(TALL, "1", "a"), sized(TALL, "2", "b")]
    found = sizes_by_concept(instance, RULE)
    (wide,), (tall,) = RULE.sizes(instance[0]), RULE.sizes(instance[1])
    assert found == {"a": {wide: 2, tall: 1}, "b": {tall: 1}}


def test_factors_are_the_smallest_that_do():
    assert choose_factors([0.5, 0.5], [10, 10]) == [1, 1]
    assert choose_factors([2, 1], [10, 10]) == [2, 1]
    assert choose_factors([0.6, 0.4], [10, 10]) == [3, 2]
    for shares in ([0.31, 0.69], [1, 30], [0.2, 0.3, 0.5]):
        counts = [7, 13, 100][: len(shares)]
        factors = choose_factors(shares, counts)
        others = [[a, b, c][: len(shares)] for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3)]
        error = share_error(shares, counts, factors)
        assert error <= 0.02 or error <= min(share_error(shares, counts, o) for o in others)


def test_concepts_of_one_class_share_its_pictures(two):
    same = {"class_prompt": "an animal", "num_class_images": 5}
    ((photos, names),) = two(same, {**same, "num_class_images": 7}).class_sets
    assert (photos.name, photos.num_class_images, names) == ("rex", 7, ["rex", "tom"])
    other = {"class_prompt": "a cat", "num_class_images": 7}
    assert [names for _, names in two(same, other).class_sets] == [["rex"], ["tom"]]
    assert [names for _, names in two(same).class_sets] == [["rex"]]


# Refusals


def problems(data):
    return {path: message for path, message in DreamBoothConfig(data=data).errors()}


def test_two_concepts_are_no_mistake(two):
    assert not any(path.startswith("data") for path in problems(two()))


@pytest.mark.parametrize(
    ("concepts", "path"),
    [
        ("[]", "data.concepts: "),
        ("[rex]", "data.concepts: "),
        ("[{name: a}]", "data.concepts[a].instance_data_dir: there are no training pictures"),
        ("[{instance_data_dir: nowhere}]", "data.concepts[concept-1].instance_data_dir: no such"),
        ("[{name: a, instance_data_dir: .}, {name: A, instance_data_dir: .}]", "data.concepts[A]"),
        ("[{name: a/b, instance_data_dir: .}]", "data.concepts[a/b].name: must be letters"),
        (f"[{{name: {'ä' * 101}, instance_data_dir: .}}]", "data.concepts[ä"),
        (f"[{{name: {'猫' * 100}, instance_data_dir: .}}]", "data.concepts[猫"),
        ("[{name: a, repeats: 0}]", "data.concepts[a].repeats: input should be greater"),
        ("[{name: a, repaets: 2}]", "data.concepts[a].repaets: unknown key; did you mean"),
        ("[{instance_data_dir: ., class_prompt: c}]", "data.concepts[concept-1].num_class_images"),
        ("[{instance_data_dir: ., mask_dir: x}]", "data.concepts[concept-1].mask_dir: no such"),
    ],
)
def test_a_mistake_in_a_concept_names_it(settings, concepts, path):
    nothing = ("data.instance_data_dir=null", "data.instance_prompt=null")
    with pytest.raises(UserError) as caught:
        settings(*nothing, f"data.concepts={concepts}")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(path)
    # of what is wrong nothing else follows
    assert all(line.startswith("data.concepts") for line in lines)


def test_keys_beside_the_concepts_are_refused_with_what_to_do(settings):
    concept = "data.concepts=[{instance_data_dir: ., instance_prompt: a}]"
    with pytest.raises(UserError) as caught:
        settings(concept)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "data.instance_data_dir",
        "data.instance_prompt",
    ]
    assert all(line.endswith("move it into them") for line in lines)


def test_one_folder_for_two_classes_is_refused(two, photos):
    shared = {"class_data_dir": photos("class", 1), "num_class_images": 1}
    found = problems(two({**shared, "class_prompt": "a dog"}, {**shared, "class_prompt": "a cat"}))
    assert "is the folder of rex too" in found["data.concepts[tom].class_data_dir"]


def test_a_folder_without_pictures_names_its_concept(two, photos):
    with pytest.raises(UserError, match=r"tom: .*empty holds no pictures"):
        load_instance_pictures(two(cat={"instance_data_dir": photos("empty", 0)}))
