"""Laws of every trainer of small networks: resuming, kill -9, processes, accumulation, seeds."""

import shutil
import signal
import time
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from tests.shared.processes import launch, start
from tests.shared.small_runs import (
    assert_close,
    assert_same,
    figures,
    measure_quickly,
    state,
    written,
)
from trainers.errors import UserError
from trainers.run import TASKS, run

pytestmark = pytest.mark.usefixtures("measured_quickly")


def test_a_checkpoint_has_every_player_and_what_they_remember(kind, whole):
    players = {
        "autoencoder": {"autoencoder"},
        "gan": {"generator", "discriminator"},
        "segment": {"unet"},
        "pix2pix": {"unet", "discriminator"},
    }
    assert {name.split(".")[0] for name in state(whole)} == players[kind]
    assert {name.split(".")[0] for name in state(whole) if ".ema." in name} == players[kind] - {
        "discriminator"
    }
    assert any(name.endswith("._u") for name in state(whole)) == (kind == "gan")


def test_stopping_and_going_on_equals_one_run(kind, make, whole):
    parts = make(kind, "stopped")
    run(parts.model_copy(update={"train": parts.train.model_copy(update={"max_train_steps": 7})}))
    run(parts)
    assert_same(whole, parts)


def test_a_run_goes_on_when_its_pictures_lie_elsewhere_and_are_not_kept_in_memory(
    make, undisturbed, blobs, tmp_path
):
    whole, moved = undisturbed("pix2pix"), shutil.copytree(blobs, tmp_path / "moved")
    parts = make("pix2pix", "moved", "train.max_train_steps=7")
    run(parts)
    run(make("pix2pix", "moved", f"data.image_dir={moved}", "data.in_memory=false"))
    assert_same(whole, parts)


def test_kill_9_and_the_same_command_give_the_same_weights(kind, make, whole, tmp_path):
    killed, log = make(kind, "killed", "checkpoint.checkpointing_steps=1"), tmp_path / "log"
    command = partial(
        start,
        "train.py",
        written(killed, tmp_path / "killed.yaml"),
        log=log,
        before=measure_quickly,
    )
    process, checkpoints = command(), killed.output_dir / "checkpoints"
    while (
        process.is_alive()
        and max((path.name for path in checkpoints.glob("step-*")), default="") < "step-000003"
    ):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed.output_dir / "model").exists()
    again = command()
    again.join()
    assert again.exitcode == 0, log.read_text()
    assert "resumed from" in log.read_text()
    assert_same(whole, killed)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_with_their_batches_together(
    kind, make, whole, tmp_path, world
):
    unmeasured = ["data.test_split=null"] if kind == "gan" else []
    parts = make(
        kind,
        f"of-{world}",
        f"train.train_batch_size={whole.train.train_batch_size // world}",
        *unmeasured,
    )
    statuses = launch(
        "train.py", written(parts, tmp_path / "parts.yaml"), log=tmp_path / "log", processes=world
    )
    assert statuses == [0] * world, (tmp_path / "log.0").read_text()
    assert_close(parts, whole)


def test_two_processes_measure_a_gan_with_a_classifier(make, tmp_path):
    """Which the first one trains, while the other waits."""
    two = make("gan", "two-measured", "train.max_train_steps=1")
    command = ("train.py", written(two, tmp_path / "two.yaml"))
    statuses = launch(*command, log=tmp_path / "log", processes=2, before=measure_quickly)
    assert statuses == [0, 0], (tmp_path / "log.0").read_text()
    assert figures(two)["kid"] > 0


def test_accumulation_equals_one_batch_or_is_refused(kind, make, whole):
    quarters = ("train.train_batch_size=1", "train.gradient_accumulation_steps=4")
    if kind in ("gan", "pix2pix"):
        with pytest.raises(UserError, match=r"train.gradient_accumulation_steps: must be 1"):
            make(kind, "accumulated", *quarters)
        return
    accumulated = make(kind, "accumulated", *quarters)
    run(accumulated)
    assert_close(accumulated, whole)


def test_pictures_decoded_at_each_step_give_the_same_training(kind, make, whole):
    lazy = make(kind, "lazy", "data.in_memory=false")
    run(lazy)
    assert_same(whole, lazy)


def test_a_seed_decides_the_first_weights_and_the_pictures_and_another_decides_otherwise(
    kind, make
):
    starts = []
    for seed in (0, 0, 1):
        task, batches, _ = TASKS[make(kind, "seed").kind](
            make(kind, "seed", f"seed={seed}"), Accelerator(cpu=True)
        )
        (batch, rng), *_ = batches(0)
        players = [
            parameter
            for player in task.players.values()
            for parameter in player.module.parameters()
        ]
        starts.append(
            [torch.cat([p.flatten() for p in players]), batch["pixels"], rng.normal((4, 3))]
        )
    one, again, other = starts
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
