"""A caption's texts are a function of it, the seed and a number; tags move and go as asked."""

from collections import Counter
from math import log, sqrt

import pytest

from trainers.data.caption_variants import Wording, distinct_texts, draw_text, every_text
from trainers.data.pictures import Picture
from trainers.errors import UserError

TAGS = "sks dog, red collar, grass, sitting, outdoors, day, wet nose, 1dog"
CAPTION = f"a photo of, {TAGS}, best quality"
AROUND = {"prefix": "a photo of,", "suffix": ", best quality"}


def tags(text):
    return [tag.strip() for tag in text.split(",")]


def allowed(n, chance=1e-9):
    """How far a share of n independent draws lies from its probability, but by `chance`.

    By Hoeffding's inequality a share leaves p +- d with at most 2 exp(-2 n d^2).
    """
    return sqrt(log(2 / chance) / (2 * n))


@pytest.mark.parametrize("keep", [0, 1, 3, 7, 8, 20])
def test_a_shuffle_keeps_the_first_tags_and_the_multiset(keep):
    wording = Wording(**AROUND, shuffle=True, keep=keep, variants=40)
    assert wording.complete(TAGS) == CAPTION
    texts = every_text([CAPTION], wording, seed=3)
    for text in texts:
        assert text.startswith("a photo of, ")
        assert text.endswith(", best quality")
        middle = tags(text)[1:-1]
        assert middle[:keep] == tags(TAGS)[:keep]
        assert Counter(middle) == Counter(tags(TAGS))
    # two tags in 40 draws miss one of their orders with a chance of 2 ^ -39
    assert len(texts) == {0: 40, 1: 40, 3: len(texts), 7: 1, 8: 1, 20: 1}[keep]
    assert keep != 3 or len(texts) > 30


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_each_tag_is_dropped_as_often_as_asked_and_what_is_kept_never(dropout):
    wording = Wording(trigger="1DOG", keep=1, dropout=dropout, variants=4000)
    counts = Counter()
    for variant in range(wording.variants):
        left = tags(wording.text(TAGS, 0, variant))
        assert left == [tag for tag in tags(TAGS) if tag in left]
        counts.update(left)
    for tag in tags(TAGS):
        share = 1 - counts[tag] / wording.variants
        if tag in ("sks dog", "1dog"):
            assert share == 0
        else:
            assert abs(share - dropout) < allowed(wording.variants)


def test_tags_are_dropped_independently_of_each_other():
    wording = Wording(dropout=0.5, variants=4000)
    texts = [set(tags(wording.text("a, b", 0, v))) for v in range(wording.variants)]
    for found in ({""}, {"a"}, {"b"}, {"a", "b"}):
        assert abs(texts.count(found) / len(texts) - 0.25) < allowed(len(texts))


def test_a_shuffle_gives_each_order_its_share():
    wording = Wording(shuffle=True, variants=6000)
    counts = Counter(wording.text("a, b, c", 1, v) for v in range(wording.variants))
    assert len(counts) == 6
    for count in counts.values():
        assert abs(count / wording.variants - 1 / 6) < allowed(wording.variants)


def test_a_variant_depends_on_caption_seed_and_number_alone():
    wording = Wording(shuffle=True, dropout=0.2, variants=20)
    texts = [wording.text(TAGS, 0, v) for v in range(20)]
    assert [wording.text(TAGS, 0, v) for v in reversed(range(20))] == texts[::-1]
    assert [wording.text(TAGS, 1, v) for v in range(20)] != texts
    renamed = [Picture(name, bytes, TAGS, wording=wording) for name in "ab"]
    assert list(distinct_texts(renamed, 0)) == list(dict.fromkeys(texts))


def test_captions_with_as_many_tags_are_not_shuffled_alike():
    wording, letters = Wording(shuffle=True, variants=20), "a, b, c, d, e, f, g, h"
    names = dict(zip(tags(letters), tags(TAGS), strict=True))
    alike = [
        [names[tag] for tag in tags(wording.text(letters, 0, v))] == tags(wording.text(TAGS, 0, v))
        for v in range(20)
    ]
    assert not any(alike)


@pytest.mark.parametrize("captions", [(TAGS,), ("a, b, c", "one", "d, e")])
def test_each_caption_and_variant_is_drawn_in_proportion_and_no_other_text(captions):
    wording, visits = Wording(shuffle=True, variants=5), 6000
    expected = Counter()
    for caption in captions:
        for variant in range(5):
            expected[wording.text(caption, 7, variant)] += 1 / 5 / len(captions)
    drawn = Counter(
        draw_text(captions, wording, (7, step, row)) for step in range(1500) for row in range(4)
    )
    assert set(drawn) == set(expected) == set(every_text(captions, wording, 7))
    for text, share in expected.items():
        assert abs(drawn[text] / visits - share) < allowed(visits)


def test_without_options_a_caption_is_left_as_it_is():
    text = "a dog ,  on,grass, "
    assert Wording().complete(text) == text
    assert every_text([text], Wording(), 0) == {text: None}
    assert draw_text([text], Wording(), (0, 5, 1)) == text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"prefix": "sks", "suffix": "photo"}, "sks a dog photo"),
        ({"prefix": "sks, ", "suffix": " photo"}, "sks, a dog photo"),
        ({"suffix": ", photo"}, "a dog, photo"),
        ({"suffix": "."}, "a dog."),
    ],
)
def test_a_prefix_and_a_suffix_stand_apart_by_one_space(keys, expected):
    assert Wording(**keys).complete("a dog") == expected


def test_a_caption_without_tags_left_has_no_comma_left():
    wording = Wording(**AROUND, dropout=1.0)
    assert wording.text(wording.complete("a, b"), 0, 0) == "a photo of, best quality"


@pytest.mark.parametrize("place", ["{trigger}", "[trigger]"])
def test_a_place_for_the_trigger_takes_it_or_is_named(place):
    assert Wording(trigger="sks").complete(f"a {place} dog, {place}") == "a sks dog, sks"
    with pytest.raises(UserError, match=r"1\.png: the caption .*set it by data\.trigger"):
        Wording().complete(f"a {place} dog", "1.png")
