"""Several processes train as one does, whatever their number, and with a base that is sharded."""

from functools import partial
from types import SimpleNamespace

import pytest
from accelerate import PartialState

from tests.shared.by_hand import by_hand_but
from tests.shared.families import ALL
from tests.shared.processes import launch
from tests.shared.runs import PRIOR, VARIED_CAPTIONS, assert_close
from trainers.config import loading
from trainers.distributed import collectives
from trainers.distributed.accelerator import make_accelerator
from trainers.distributed.collectives import (
    own_items,
    run_across_processes,
)
from trainers.errors import UserError
from trainers.run import run

FAMILIES = by_hand_but(["flux"], ALL)
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def trained(settings, tmp_path):
    """A function: name, processes, family, overrides -> settings of a finished run and what its
    processes printed."""

    def make(name, world, *overrides, family="sd15", **environment):
        final = settings(*overrides, f"output_dir={tmp_path}/{name}", family=family)
        (tmp_path / f"{name}.yaml").write_text(loading.dump_config(final))
        log = tmp_path / f"{name}.log"
        statuses = launch(
            "train.py", tmp_path / f"{name}.yaml", log=log, processes=world, **environment
        )
        printed = [(tmp_path / f"{name}.log.{rank}").read_text() for rank in range(world)]
        assert statuses == [0] * world, printed[0][-3000:]
        return final, printed

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_one_two_and_four_processes_train_alike(
    trained, settings, tmp_path, captioned_photos, family
):
    shared = (*PRIOR, f"data.instance_data_dir={captioned_photos}", *VARIED_CAPTIONS)
    one = settings(
        "train.train_batch_size=1", "train.gradient_accumulation_steps=4", *shared, family=family
    )
    run(one)
    for world in (2, 4):
        parts = (
            "train.train_batch_size=1",
            f"train.gradient_accumulation_steps={4 // world}",
            *shared,
        )
        assert_close(one, trained(f"of-{world}", world, *parts, family=family)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_sharded_over_two_processes_trains_and_samples_like_a_whole_one(
    trained, settings, other_photos, family
):
    """Class pictures, held-out photos, samples, text encoders and the reload proof too; then one
    process goes on."""
    everything = (
        *PRIOR,
        "validation.prompts=[a b c, x, y]",
        "validation.validation_steps=2",
        "train.ema_decay=0.9",
    )
    everything += (
        "train.train_text_encoder=true",
        f"data.held_out_dir={other_photos}",
    )
    whole = settings(*everything, "train.train_batch_size=2", family=family)
    run(whole)
    half = (*everything, "train.train_batch_size=1", "train.max_train_steps=4")
    cut, printed = trained("cut", 2, *half, family=family, **FSDP)
    assert "FSDP2: each process holds 50.0% of the base's" in printed[0]
    run(
        settings(
            *everything, "train.train_batch_size=2", f"output_dir={cut.output_dir}", family=family
        )
    )
    assert_close(whole, cut)
    for name in ("step-000002/00-0.png", "step-000004/02-0.png", "step-000004/grid.png"):
        assert (cut.output_dir / "samples" / name).exists()
    names = [path.name for path in sorted((whole.output_dir / "class_images").glob("*.png"))]
    assert names == [path.name for path in sorted((cut.output_dir / "class_images").glob("*.png"))]


@pytest.mark.parametrize("family", ["flux"])
def test_a_base_in_four_bits_can_be_sharded_too(trained, settings, family):
    small = (
        "model.quantization=nf4",
        "validation.prompts=[a b c]",
        "validation.validation_steps=4",
    )
    whole = settings(*small, family=family)
    run(whole)
    cut, printed = trained("cut", 2, *small, "train.train_batch_size=1", family=family, **FSDP)
    assert "FSDP2: each process holds 50.0% of the base's" in printed[0]
    assert_close(whole, cut)


@pytest.mark.slow
def test_a_sharded_base_samples_what_a_whole_one_samples(trained):
    overrides = (
        "validation.prompts=[a b c, x, y]",
        "validation.num_images=2",
        "optimizer.learning_rate=0",
    )
    whole, _ = trained("whole", 1, *overrides)
    cut, _ = trained("cut", 2, *overrides, "train.train_batch_size=1", **FSDP)
    for path in sorted((whole.output_dir / "samples/final").glob("*.png")):
        assert path.read_bytes() == (cut.output_dir / "samples/final" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        ((), {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (("lora=null",), FSDP, "nothing is frozen"),
        (("model.quantization=int8",), FSDP, "cannot cut weights in int8"),
    ],
)
def test_sharding_that_is_not_possible_is_refused(
    settings, monkeypatch, overrides, environment, message
):
    for name, value in (FSDP | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        make_accelerator(settings(*overrides))


def test_shares_are_equal_and_what_comes_back_is_in_order(monkeypatch):
    for world in (1, 2, 3, 4):
        for count in (1, 2, 5, 8):
            ranks = [process(rank, world) for rank in range(world)]
            shares = [own_items(range(count), rank) for rank in ranks]
            assert len({len(share) for share in shares}) == 1
            assert set().union(*shares) == set(range(count))
            everything = [(number, number) for share in shares for number in share]
            monkeypatch.setattr(collectives, "gather_object", lambda mine, all=everything: all)
            results = run_across_processes([partial(int, i) for i in range(count)], ranks[-1])
            assert results == list(range(count))


def test_without_jobs_nothing_is_shared():
    assert own_items([], process(1, 2)) == []


def process(rank, world):
    """What `split_between_processes` reads of an accelerator."""
    state = SimpleNamespace(process_index=rank, num_processes=world)
    state.split_between_processes = partial(PartialState.split_between_processes, state)
    return state
