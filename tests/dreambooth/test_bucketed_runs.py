"""A run over photos of many shapes does not depend on how it is divided, in steps or in rows."""

import pytest
from accelerate import Accelerator
from PIL import Image

from tests.shared.by_hand import EACH_TIME, by_hand_but
from tests.shared.families import ALL
from tests.shared.processes import launch
from tests.shared.runs import (
    PRIOR,
    assert_close,
    assert_same,
    held_out_losses,
    losses,
    run_steps,
)
from trainers import dreambooth
from trainers.config import loading
from trainers.run import run
from trainers.training.facts import config_facts, explain_config

SIZES = {
    "sd15": [(24, 40), (32, 32), (40, 24)],
    "sdxl": [(24, 40), (32, 32), (40, 24)],
    "sd3": [(16, 48), (32, 32), (48, 16)],
    "flux": [(16, 48), (32, 32), (48, 16)],
}


@pytest.fixture
def mixed(settings, shapes, tmp_path):
    """A function: name, overrides, family -> Config of a run on photos of many shapes."""

    def make(name, *overrides, family="sd15"):
        shared = (
            f"data.instance_data_dir={shapes}",
            "data.resolution=32",
            "data.center_crop=false",
            "data.cache_variants=2",
            f"data.cache_dir={tmp_path}/cache",
            f"data.class_data_dir={tmp_path}/class",
            *PRIOR,
        )
        return settings(*shared, *overrides, f"output_dir={tmp_path}/{name}", family=family)

    return make


def sizes(config):
    _, batches, _ = dreambooth.build(config, Accelerator(cpu=True))
    return [bucket.size for bucket in batches.buckets]


@pytest.mark.parametrize("family", by_hand_but(EACH_TIME, ALL))
def test_three_steps_and_three_more_equal_six(mixed, family):
    straight, parts = mixed("straight", family=family), mixed("parts", family=family)
    run(straight)
    run_steps(parts, 3)
    run(parts)
    assert_same(straight, parts)
    assert sizes(straight) == SIZES[family]


@pytest.mark.parametrize("family", by_hand_but(EACH_TIME, ALL))
def test_accumulation_equals_one_batch(mixed, family):
    one = mixed("one", "train.train_batch_size=4", family=family)
    run(one)
    for rows in (2, 1):
        accumulation = f"train.gradient_accumulation_steps={4 // rows}"
        parts = mixed(f"of-{rows}", f"train.train_batch_size={rows}", accumulation, family=family)
        run(parts)
        assert_close(one, parts)


def test_two_processes_equal_one(mixed, tmp_path):
    held_out = f"data.held_out_dir={tmp_path}/others"
    (tmp_path / "others").mkdir()
    for i, size in enumerate([(40, 24), (24, 40)]):
        Image.effect_noise(size, 50 + i).convert("RGB").save(tmp_path / "others" / f"{i}.png")
    one = mixed("one", "train.train_batch_size=4", held_out, "validation.validation_steps=3")
    run(one)
    two = mixed("two", "train.train_batch_size=2", held_out, "validation.validation_steps=3")
    (tmp_path / "two.yaml").write_text(loading.dump_config(two))
    log = tmp_path / "log"
    assert launch("train.py", tmp_path / "two.yaml", log=log, processes=2) == [0, 0]
    assert_close(one, two)
    measured = [held_out_losses(config) for config in (one, two)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert len(measured[0]) == 2


def test_square_photos_train_as_without_buckets(settings, tmp_path):
    folder = tmp_path / "squares"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((24 + i, 24 + i), 60).convert("RGB").save(folder / f"{i}.png")
    with_buckets = settings(f"data.instance_data_dir={folder}", f"output_dir={tmp_path}/with")
    without = settings(
        f"data.instance_data_dir={folder}", "data.buckets=false", f"output_dir={tmp_path}/without"
    )
    run(with_buckets)
    run(without)
    assert_same(with_buckets, without)


def test_several_areas_are_trained_and_the_batch_is_tried_with_the_largest(mixed):
    config = mixed("areas", "data.resolution=[16, 32]", "train.auto_micro_batch=true")
    run(config)
    assert (8, 24) in sizes(config)
    assert (24, 40) in sizes(config)
    assert len(losses(config)) == 6


def test_a_run_of_an_earlier_version_had_squares(settings):
    """Its checkpoints do not say so, and going on with buckets would be another training."""
    config = settings()
    current = config_facts(config)
    saved = {key: value for key, value in current.items() if not key.startswith("data.buckets")}
    lines = explain_config(saved, current, config)
    assert lines == {"data.buckets": "data.buckets: was false, is true"}
