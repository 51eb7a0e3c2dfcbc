"""Which picture, variant and caption a row has depends on (seed, step, row) alone."""

from collections import Counter
from zlib import crc32

import pytest
import torch

from tests.shared.fake_pictures import Fake, fake
from tests.shared.pictures import data
from trainers.data.buckets import Bucket
from trainers.data.caption_variants import Wording, distinct_texts
from trainers.data.crops import Crop, choose_crop
from trainers.data.dreambooth_batches import DreamBoothBatches
from trainers.data.pictures import Picture
from trainers.data.rng import permutation
from trainers.data.sampler import BatchSlice


def test_a_variant_depends_on_content_and_number_only():
    free, many = data(center_crop=False, random_flip=True), [fake(i) for i in range(400)]
    size = (512, 512)
    renamed = Picture("other name", many[0].read, "other caption")
    assert (
        choose_crop(renamed, 0, size, free)
        == choose_crop(many[0], 0, size, free)
        != choose_crop(many[0], 1, size, free)
    )
    crops = [choose_crop(p, 0, size, free) for p in many]
    assert len({(v.left, v.top) for v in crops}) == 400
    assert 0.4 < sum(v.flip for v in crops) / 400 < 0.6
    assert {choose_crop(p, 0, size, data()) for p in many} == {Crop(512, 512)}


POOLS = [[fake(i, "i" * (i + 1)) for i in range(5)], [fake(i, "c" * i) for i in range(10, 17)]]
WORDING = Wording(shuffle=True, keep=1, dropout=0.3, variants=4)
# pictures with several captions, whose tags are shuffled and dropped
WORDED = [
    fake(i, "i" * (i + 1), others=("a, b, c", "d, e, f, g"), wording=WORDING) for i in range(5)
]
VARIED = data(center_crop=False, random_flip=True, caption_dropout=0.3, prior_loss_weight=0.5)


KEPT = {"": ["p" * i for i in range(20, 23)]}


def batches(
    size=2, accumulation=1, rank=0, world=1, settings=VARIED, pools=POOLS, seed=0, kept=None
):
    batch_slice = BatchSlice(seed, size, accumulation, rank, world)
    buckets = [Bucket((512, 512), pools)]
    return DreamBoothBatches(pools, Fake(), settings, batch_slice, buckets, kept_prompts=kept or {})


def samples(source, step):
    """[(row, moments, prompt length, weight)] of a step, each weight as a share of the step's
    loss."""
    found, micros = [], source.batch_slice.accumulation_steps * source.batch_slice.world_size
    for batch, rng in source(step):
        parts = batch["moments"], batch["text"]["text"], batch["weight"] / micros
        found += zip(rng.rows, *(part.tolist() for part in parts), strict=True)
    return found


def test_a_permutation_depends_on_its_seed_only():
    orders = [permutation(seed, 20) for seed in range(4)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    permutation.cache_clear()
    assert permutation(0, 20) == orders[0]


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_every_picture_is_visited_once_in_each_epoch(size):
    source, fixed = (
        batches(size, settings=data(), pools=POOLS[:1]),
        [int(p.digest[:12], 16) for p in POOLS[0]],
    )
    visits = [moments[0] for step in range(10) for _, moments, _, _ in samples(source, step)]
    epochs = [visits[i : i + 5] for i in range(0, len(visits) - 4, 5)]
    assert all(sorted(epoch) == sorted(fixed) for epoch in epochs)


@pytest.mark.parametrize(
    "pools",
    [POOLS[:1], POOLS, [WORDED, POOLS[1]]],
    ids=["instance", "prior", "captions that vary"],
)
@pytest.mark.parametrize(
    ("size", "accumulation", "world"), [(2, 2, 2), (2, 1, 4), (4, 1, 2), (8, 1, 1), (1, 8, 1)]
)
def test_a_global_batch_does_not_depend_on_how_it_is_shared(pools, size, accumulation, world):
    for step in (0, 7):
        whole = samples(batches(2, 4, pools=pools), step)
        ranks = [batches(size, accumulation, rank, world, pools=pools) for rank in range(world)]
        shared = [sample for rank in ranks for sample in samples(rank, step)]
        assert sorted(map(str, shared)) == sorted(map(str, whole))
        assert sorted(row for row, *_ in whole) == list(range(8 * len(pools)))


@pytest.mark.parametrize(("size", "accumulation", "world"), [(2, 2, 2), (4, 1, 2), (1, 8, 1)])
def test_prompts_to_keep_do_not_depend_on_how_a_batch_is_shared(size, accumulation, world):
    shared = {"pools": [WORDED], "kept": KEPT}
    for step in (0, 7):
        whole = samples(batches(8, **shared), step)
        ranks = [batches(size, accumulation, rank, world, **shared) for rank in range(world)]
        parts = [sample for rank in ranks for sample in samples(rank, step)]
        assert sorted(map(str, parts)) == sorted(map(str, whole))
        told = [text[0] for _, _, text, _ in whole[8:]]
        assert told == [20 + (8 * step + row) % 3 for row in range(8)]


def test_a_row_that_keeps_a_prompt_has_the_view_and_the_draws_of_its_photo():
    source = batches(4, pools=[WORDED], kept=KEPT)
    for step in range(20):
        ((batch, rng),) = source(step)
        assert batch["num_kept"] == 4
        assert torch.equal(batch["moments"][:4], batch["moments"][4:])
        assert torch.equal(*rng.normal((8, 5)).chunk(2))
        assert torch.equal(*rng.uniform(stratified=True).chunk(2))
        assert batch["weight"].tolist() == [0.25] * 4 + [0.125] * 4
    assert source.sample_names(0) == batches(4, pools=[WORDED]).sample_names(0)


@pytest.mark.parametrize("pools", [POOLS, [WORDED]], ids=["plain", "captions that vary"])
def test_a_step_does_not_depend_on_the_steps_before(pools):
    walked = batches(pools=pools)
    history = [samples(walked, step) for step in range(20)]
    permutation.cache_clear()
    assert samples(batches(pools=pools), 19) == history[19]
    assert samples(batches(seed=1, pools=pools), 19) != history[19] != history[18]


def test_a_visit_sees_a_text_that_was_encoded_beforehand():
    encoded = {crc32(text.encode()) for text in (*distinct_texts(WORDED, 0), "")}
    seen = set()
    for step in range(300):
        seen |= {text[1] for _, _, text, _ in samples(batches(pools=[WORDED]), step)}
    assert seen == encoded


@pytest.mark.parametrize(
    ("pools", "total"), [(POOLS[:1], 1), (POOLS, 1.5)], ids=["instance", "prior"]
)
def test_weights_sum_to_one_and_the_prior_weight(pools, total):
    for batch, _ in batches(3, 2, pools=pools)(0):
        assert batch["weight"].sum().item() == pytest.approx(total)
        assert batch["weight"][:3].sum().item() == pytest.approx(1)


def test_captions_belong_to_their_pictures_and_the_asked_share_is_dropped():
    written = {int(p.digest[:12], 16): len(p.caption) for pool in POOLS for p in pool}
    seen = [
        (written[m[0]], text[0])
        for step in range(250)
        for _, m, text, _ in samples(batches(4), step)
    ]
    assert all(length in (0, caption) for caption, length in seen)
    counts = Counter(length == 0 for _, length in seen)
    assert (
        abs(counts[True] / len(seen) - 0.3) < 4 * (0.3 * 0.7 / len(seen)) ** 0.5
    )  # four standard errors


def test_all_variants_are_visited_and_no_more():
    settings = data(center_crop=False, cache_variants=3)
    seen = {
        tuple(m)
        for step in range(100)
        for _, m, _, _ in samples(batches(settings=settings, pools=POOLS[:1]), step)
    }
    assert len(seen) == 5 * 3
