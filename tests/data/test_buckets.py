"""Sizes of pictures: none is distorted, little is cut off, and each is seen in proportion."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.shared.fake_pictures import Fake, fake, number
from tests.shared.pictures import data
from trainers.config import DreamBoothConfig
from trainers.config.family_facts import family_facts, family_names
from trainers.data.buckets import (
    MAX_ASPECT,
    BucketRule,
    bucket_sizes,
    enlargement,
    least_cropped,
    make_buckets,
    share_cut_off,
    share_out,
)
from trainers.data.crops import Crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.sampler import BatchSlice, choose_bucket
from trainers.errors import UserError

# of cameras, telephones, screens and prints, wide and tall
SHAPES = [(1, 1), (5, 4), (4, 3), (7, 5), (3, 2), (16, 10), (16, 9), (2, 1), (21, 9), (3, 1)]
SHAPES += [(height, width) for width, height in SHAPES[1:]]


@pytest.mark.parametrize("resolution", [512, 768, 1024])
@pytest.mark.parametrize("family", family_names())
def test_sizes_suit_the_model_and_have_about_the_area_of_the_square(family, resolution):
    multiple = family_facts(family).pixel_multiple
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert {(height, width) for width, height in sizes} == {*sizes}
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert 0.9 * resolution**2 <= width * height <= resolution**2
        assert max(width, height) <= MAX_ASPECT * min(width, height)
    assert all(one < other for one, other in pairwise(sizes))


@pytest.mark.parametrize("resolution", [512, 768, 1024])
@pytest.mark.parametrize("family", family_names())
def test_at_most_8_percent_are_cut_off_up_to_4_to_1_and_5_percent_of_usual_shapes(
    family, resolution
):
    sizes = bucket_sizes(resolution, family_facts(family).pixel_multiple)
    for long in range(1000, 4001, 7):
        for picture in ((long, 1000), (1000, long)):
            assert share_cut_off(picture, least_cropped(picture, sizes)) < 0.08
    for width, height in SHAPES:
        picture = 400 * width, 400 * height
        assert share_cut_off(picture, least_cropped(picture, sizes)) < 0.05


@pytest.mark.parametrize("picture", [(401, 300), (300, 401), (64, 64), (200, 50), (124, 388)])
@pytest.mark.parametrize("size", [(48, 32), (32, 48), (40, 40), (64, 16)])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_crop_is_not_distorted(picture, size, place):
    """Of a picture whose colors are its coordinates, one pixel of the crop is as far along as the
    next one, in both directions alike."""
    x = np.linspace(0, 255, picture[0])[None, :].repeat(picture[1], 0)
    y = np.linspace(0, 255, picture[1])[:, None].repeat(picture[0], 1)
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    pixels = (Crop(*size, place, place)(image) + 1) * 127.5
    assert pixels.shape == (3, size[1], size[0])
    across = (pixels[0, :, -4] - pixels[0, :, 3]).mean() / (size[0] - 7) * picture[0]
    down = (pixels[1, -4, :] - pixels[1, 3, :]).mean() / (size[1] - 7) * picture[1]
    # colors are whole numbers, and resized sides whole pixels
    assert across.item() == pytest.approx(down.item(), rel=0.06)


def test_the_crop_is_what_share_cut_off_says_and_geometry_tells_where_it_is():
    for picture, size in (((4000, 3000), (576, 448)), ((700, 900), (512, 512))):
        (width, height), (left, top) = Crop(*size, 0.25, 1.0).box(picture)
        cut = 1 - size[0] * size[1] / (width * height)
        assert cut == pytest.approx(share_cut_off(picture, size), abs=0.005)
        geometry = Crop(*size, 0.25, 1.0).geometry(picture)
        assert geometry == (picture[1], picture[0], top, left, size[1], size[0])
        assert top == height - size[1]
        assert left == round(0.25 * (width - size[0]))


def test_a_mirrored_crop_lies_where_the_mirrored_picture_has_it():
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    mirrored = ImageOps.mirror(image)
    *_, left, height, width = geometry = Crop(24, 24, 0.25, flip=True).geometry(image.size)
    assert geometry == (24, 40, 0, left, height, width) == (24, 40, 0, 12, 24, 24)
    assert Crop(24, 24, left / 16).geometry(image.size) == geometry
    assert torch.equal(Crop(24, 24, 0.25, flip=True)(image), Crop(24, 24, left / 16)(mirrored))


def test_several_areas_and_pictures_that_are_too_small_for_some():
    rule = BucketRule((512, 768, 1024), 16, max_upscale=1.0)
    assert rule.sizes(fake("large", size=(2000, 2000))) == [(512, 512), (768, 768), (1024, 1024)]
    assert rule.sizes(fake("medium", size=(800, 800))) == [(512, 512), (768, 768)]
    # 7/8 of 512
    assert rule.sizes(fake("small", size=(450, 450))) == [(448, 448)]
    with pytest.raises(UserError, match=r"tiny has 200 x 200 pixels, too few .*=512 .*as large"):
        rule.sizes(fake("tiny", size=(200, 200)))
    generous = BucketRule((512,), 16, max_upscale=3.0)
    assert generous.sizes(fake("tiny", size=(200, 200))) == [(512, 512)]
    squares = BucketRule((512, 768), 16, max_upscale=1.0, enabled=False)
    assert squares.sizes(fake("any", size=(90, 400))) == [(512, 512), (768, 768)]


@pytest.mark.parametrize("max_upscale", [1.0, 1.3, 2.0])
def test_no_picture_is_enlarged_beyond_the_limit(max_upscale):
    rule = BucketRule((512,), 8, max_upscale)
    for width, height in SHAPES:
        for scale in (30, 60, 120, 240):
            picture = fake("p", size=(scale * width, scale * height))
            try:
                (size,) = rule.sizes(picture)
            except UserError:
                # not even at half of the side
                assert enlargement(picture.facts.size, (256, 256)) > max_upscale / MAX_ASPECT
                continue
            assert enlargement(picture.facts.size, size) <= max_upscale


def test_no_side_is_longer_than_the_model_can_take():
    assert max(max(size) for size in bucket_sizes(512, 16)) == 1024
    assert max(max(size) for size in bucket_sizes(512, 16, 700)) == 672


MIXED = [
    [fake(f"wide {i}", size=(600, 400), repeats=1 + (i == 0)) for i in range(5)]
    + [fake(f"tall {i}", size=(400, 600)) for i in range(3)],
    [fake(f"class {i}", size=(600, 400)) for i in range(4)]
    + [fake(f"square {i}", size=(500, 500)) for i in range(2)],
]
RULE = BucketRule((512,), 8)


def batches(pools=MIXED, size=2, accumulation=1, rank=0, world=1, seed=0):
    batch_slice = BatchSlice(seed, size, accumulation, rank, world)
    settings = data(cache_variants=3, center_crop=False)
    return DreamBoothBatches(pools, Fake(), settings, batch_slice, make_buckets(pools, RULE))


def test_a_bucket_has_its_pictures_and_class_pictures_of_its_size_or_else_all():
    buckets = {bucket.size: bucket.pools for bucket in make_buckets(MIXED, RULE)}
    assert [*buckets] == [(416, 608), (608, 416)]
    names = {size: [[p.name for p in pool] for pool in pools] for size, pools in buckets.items()}
    everything = [picture.name for picture in MIXED[1]]
    assert names[416, 608] == [["tall 0", "tall 1", "tall 2"], everything]
    assert names[608, 416][0] == ["wide 0", "wide 0", "wide 1", "wide 2", "wide 3", "wide 4"]
    assert names[608, 416][1] == ["class 0", "class 1", "class 2", "class 3"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_picture_is_visited_in_proportion(size):
    """In one cycle, which has a step for each picture as often as it counts."""
    source, visits = batches(MIXED[:1], size), Counter()
    cycle = sum(source.counts)
    for step in range(3 * cycle):
        visits.update(name for part in source.sample_names(step) for name in part)
        if (step + 1) % cycle == 0:
            times = (step + 1) // cycle * size
            assert visits == {p.name: times * p.repeats for p in MIXED[0]}


def test_a_global_batch_is_of_one_size_and_knows_its_geometry():
    source = batches()
    for step in range(20):
        ((batch, _),) = source(step)
        width, height = source.bucket(step)[0].size
        assert {tuple(row[4:].tolist()) for row in batch["geometry"]} == {(height, width)}
        original = {number(p): (p.facts.size[1], p.facts.size[0]) for pool in MIXED for p in pool}
        for moments, row in zip(batch["moments"], batch["geometry"], strict=True):
            assert tuple(row[:2].tolist()) == original[int(moments[0])]


@pytest.mark.parametrize(
    ("size", "accumulation", "world"), [(2, 2, 2), (2, 1, 4), (4, 1, 2), (8, 1, 1), (1, 8, 1)]
)
def test_buckets_do_not_depend_on_how_the_batch_is_shared(size, accumulation, world):
    def rows(step, *settings):
        for batch, rng in batches(MIXED, *settings)(step):
            yield from zip(rng.rows, batch["moments"].tolist(), strict=True)

    for step in range(12):
        whole = sorted(rows(step, 2, 4))
        parts = []
        for rank in range(world):
            parts += rows(step, size, accumulation, rank, world)
        assert sorted(parts) == whole


def test_a_bucket_of_a_step_does_not_depend_on_the_steps_before():
    counts = [6, 3, 1]
    walked = [choose_bucket(7, step, counts) for step in range(45)]
    assert [choose_bucket(7, step, counts) for step in reversed(range(45))] == walked[::-1]
    seen = Counter()
    for bucket, previous in walked:
        assert previous == seen[bucket]
        seen[bucket] += 1
    orders = [[bucket for bucket, _ in walked[i : i + 10]] for i in range(0, 40, 10)]
    assert all(Counter(order) == {0: 6, 1: 3, 2: 1} for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert [choose_bucket(8, step, counts) for step in range(45)] != walked


def test_the_heaviest_step_has_the_largest_pictures():
    pools = [[fake(i, size=(600, 600)) for i in range(9)] + [fake("wide", size=(600, 300))]]
    buckets = make_buckets(pools, RULE)
    assert [bucket.size for bucket in buckets] == [(512, 512), (704, 352)]
    source = DreamBoothBatches(pools, Fake(), data(), BatchSlice(0, 1), buckets)
    for start in range(20):
        step = source.heaviest_step(start)
        assert start <= step < start + 3
        assert source.bucket(step)[0].size == (512, 512)


@pytest.mark.parametrize("total", [0, 1, 7, 100])
def test_class_pictures_are_drawn_in_proportion_to_the_sizes(total):
    weights = {(1, 1): 5, (1, 2): 3, (2, 1): 1}
    shares = share_out(total, weights)
    assert sum(shares.values()) == total
    for size, weight in weights.items():
        assert abs(shares.get(size, 0) - total * weight / 9) < 1


def test_a_square_that_the_model_cannot_take_is_an_error_of_the_config():
    config = DreamBoothConfig(data={"resolution": [512, 1024]})
    assert BucketRule.from_config(config, 1024).max_side == 1024
    with pytest.raises(UserError, match=r"data\.resolution: 1024 is more than the 1000 pixels"):
        BucketRule.from_config(config, 1000)
