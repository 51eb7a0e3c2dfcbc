"""Decoding ahead and encoding in batches change neither order nor result."""

import random
import threading
import time
from itertools import groupby

import pytest
import torch
from accelerate import Accelerator

from trainers.data.batched_encoding import THREADS, BatchEncoder, decode_views, map_ahead
from trainers.data.crops import Crop
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.pictures import Picture
from trainers.families import FAMILIES

OUT_OF_MEMORY = "CUDA error: out of memory"


def test_results_come_in_order_and_only_the_next_few_are_computed():
    started, lock = [], threading.Lock()

    def double(i):
        with lock:
            started.append(i)
        time.sleep(random.Random(i).random() / 100)
        return 2 * i

    for taken, result in enumerate(map_ahead(double, range(40)), 1):
        assert result == 2 * (taken - 1)
        assert len(started) <= taken + THREADS
    assert sorted(started) == list(range(40))


def test_an_error_comes_where_its_result_would_and_ends_the_work():
    started, results = [], []

    def invert(i):
        started.append(i)
        return 1 / (5 - i)

    with pytest.raises(ZeroDivisionError):
        results.extend(map_ahead(invert, range(1000)))
    assert len(results) == 5
    assert len(started) <= 6 + THREADS


def test_views_come_in_their_order_and_a_picture_is_decoded_once_for_some_of_them(
    settings, monkeypatch
):
    decoded, plain = [], Picture.decode

    def decode(picture):
        decoded.append(picture.name)
        return plain(picture)

    pictures = load_instance_pictures(settings().data)
    monkeypatch.setattr(Picture, "decode", decode)
    crops = [Crop(16, 16, left, top) for left in (0.0, 0.5, 1.0) for top in (0.0, 1.0)]
    views = [(picture, crop) for picture in pictures for crop in crops]
    pixels = list(decode_views(views))
    assert len(decoded) == 2 * len(pictures)
    for (picture, crop), tensor in zip(views, pixels, strict=True):
        assert torch.equal(tensor, crop(plain(picture)))


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_are_of_one_kind_and_at_most_their_size(size):
    batches, items = [], [random.Random(i // 5).randrange(10) for i in range(60)]

    def encode(batch):
        batches.append(batch)
        return [-item for item in batch]

    assert list(BatchEncoder(size)(encode, items, kind=int)) == [-item for item in items]
    assert all(len(set(batch)) == 1 and len(batch) <= size for batch in batches)
    runs = [len(list(group)) for _, group in groupby(items)]
    assert len(batches) == sum(-(-run // size) for run in runs)


def test_a_batch_that_does_not_fit_into_memory_is_halved_once_and_nothing_is_lost():
    tried = []

    def encode(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise RuntimeError(OUT_OF_MEMORY)
        return batch

    with pytest.warns(UserWarning, match="encode_batch_size: out of memory") as caught:
        assert list(BatchEncoder(8)(encode, range(20), kind=type)) == list(range(20))
    assert tried == [8, 4, *(2,) * 10]
    ends = [str(warning.message).rpartition("so it is ")[2] for warning in caught]
    assert ends == ["4 from here on", "2 from here on"]


@pytest.mark.parametrize(("message", "size"), [("other", 8), (OUT_OF_MEMORY, 1)])
def test_other_errors_and_one_item_that_does_not_fit_are_raised(message, size):
    def encode(batch):
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        list(BatchEncoder(size)(encode, range(20), kind=type))


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_batches_encode_as_one_by_one_within_rounding(settings, tmp_path, family):
    """Sums over other blocks: a relative error of some 1e-6 was measured."""
    config = settings(family=family)
    pictures = load_instance_pictures(config.data)
    views = [(picture, Crop.square(side)) for side in (16, 24) for picture in pictures]
    prompts = ["a b c", "", "d", "e f", "g h i j"]
    encoders = []
    for size in (1, 4):
        folder = tmp_path / f"{family}-{size}"
        encoder = CachedEncoder(FAMILIES[family](config.model), folder, True, (), size)
        encoder.fill(views, prompts, Accelerator(cpu=True))
        encoders.append(encoder)
    one, four = encoders
    pairs = [(one.moments(*view), four.moments(*view)) for view in views]
    for prompt in prompts:
        expected, found = one.text_inputs(prompt), four.text_inputs(prompt)
        assert expected.keys() == found.keys()
        pairs += [(expected[name], found[name]) for name in expected]
    for expected, found in pairs:
        assert expected.shape == found.shape
        assert (expected - found).norm() <= 2e-5 * expected.norm()
