"""Copies are found though they were resized, saved anew or cut a little; others are no copies."""

import io
import itertools

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.shared.messy_folder import scene
from trainers.data.near_duplicates import (
    HASH_SIDE,
    MAX_DIFFERENT_BITS,
    NUM_BITS,
    find_near_duplicates,
    perceptual_hash,
)

SIZE = (320, 240)


def hash_of(image):
    return perceptual_hash(image.convert("L"))


def as_jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=20)
    return Image.open(io.BytesIO(buffer.getvalue()))


def cut(image, share):
    width, height = image.size
    return image.crop((0, 0, round(width * (1 - share)), round(height * (1 - share))))


COPIES = {
    "smaller": lambda image: image.resize((80, 60)),
    "larger": lambda image: image.resize((900, 675)),
    "saved anew": as_jpeg,
    "cut": lambda image: cut(image, 0.02),
    "cut and smaller": lambda image: cut(image, 0.02).resize((160, 120)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "gray": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("seed", range(6))
def test_a_copy_is_found(seed, copy):
    image = scene(seed, SIZE)
    hashes = [hash_of(scene(100 + seed, SIZE)), hash_of(image), hash_of(COPIES[copy](image))]
    assert find_near_duplicates(hashes) == {2: 1}


def test_different_pictures_are_no_copies():
    hashes = [hash_of(scene(seed, SIZE)) for seed in range(40)]
    assert find_near_duplicates(hashes) == {}


def test_plain_pictures_are_no_copies_of_each_other():
    hashes = [hash_of(Image.new("RGB", SIZE, color)) for color in ("red", "blue", "white")]
    assert hashes == [None] * 3
    assert find_near_duplicates(hashes) == {}


def flipped(text, count):
    """The hash with its first bits turned."""
    number = int(text, 16) ^ ((1 << count) - 1)
    return f"{number:0{NUM_BITS // 4}x}"


def test_the_distance_is_the_librarys_and_the_limit_belongs_to_the_copies():
    first = hash_of(scene(0, SIZE))
    for bits, is_copy in ((MAX_DIFFERENT_BITS, True), (MAX_DIFFERENT_BITS + 2, False)):
        other = flipped(first, bits)
        assert imagehash.hex_to_hash(first) - imagehash.hex_to_hash(other) == bits
        assert bool(find_near_duplicates([first, other])) == is_copy


def test_each_is_a_copy_of_the_nearest_one_before_it_in_sets_of_any_size():
    random = np.random.default_rng(0)
    hashes = [random.bytes(HASH_SIDE**2 // 8).hex() for _ in range(1200)]
    hashes[5] = None
    hashes[1100] = flipped(hashes[7], 9)
    hashes[1101] = flipped(hashes[7], 8)
    hashes[600] = hashes[2]
    distances = {}
    for a, b in itertools.combinations((7, 1100, 1101), 2):
        distances[b, a] = imagehash.hex_to_hash(hashes[a]) - imagehash.hex_to_hash(hashes[b])
    assert distances[1101, 1100] == 1
    assert find_near_duplicates(hashes) == {600: 2, 1100: 7, 1101: 1100}


def test_no_pictures_have_no_copies():
    assert find_near_duplicates([]) == find_near_duplicates([None]) == {}
