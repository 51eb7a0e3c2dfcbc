"""Signals and kill -9: a checkpoint first, the right exit status, the same weights afterwards."""

import random
import signal
import subprocess
import time

import pytest
import torch

from tests.shared.processes import ROOT, start
from tests.shared.runs import PRIOR, command, environment, lora, losses
from trainers import dreambooth
from trainers.config import loading
from trainers.errors import Interrupted
from trainers.run import run
from trainers.training import callbacks
from trainers.training.checkpoint import read_checkpoint


@pytest.fixture
def undisturbed(settings, tmp_path):
    final = settings(
        *PRIOR,
        "train.max_train_steps=30",
        "checkpoint.checkpointing_steps=1",
        f"output_dir={tmp_path}/whole",
    )
    run(final)
    return final


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_and_the_same_command_give_the_same_weights(
    undisturbed, tmp_path, seed
):
    """Kills land in steps and inside saves: a checkpoint is written at each step, and half the time
    goes there."""
    killed = undisturbed.model_copy(update={"output_dir": tmp_path / "killed"})
    (tmp_path / "killed.yaml").write_text(loading.dump_config(killed))
    r, checkpoints = random.Random(seed), tmp_path / "killed" / "checkpoints"
    for wanted in sorted(r.sample(range(2, 28), 2)):
        process = start("train.py", tmp_path / "killed.yaml", log=tmp_path / "log")
        while process.is_alive() and not list(checkpoints.glob(f"*step-{wanted:06d}")):
            time.sleep(0.001)
        time.sleep(r.uniform(0, 0.05))
        process.kill()
        process.join()
    again = start("train.py", tmp_path / "killed.yaml", log=tmp_path / "log")
    again.join()
    assert again.exitcode == 0
    assert losses(undisturbed) == losses(killed)
    assert all(
        torch.equal(lora(undisturbed)[name], lora(killed)[name]) for name in lora(undisturbed)
    )


@pytest.mark.slow
def test_a_signal_checkpoints_and_exits_with_its_status(undisturbed, tmp_path):
    (tmp_path / "stopped.yaml").write_text(
        loading.dump_config(undisturbed.model_copy(update={"output_dir": tmp_path / "stopped"}))
    )
    steps = command(
        tmp_path / "stopped.yaml",
        "checkpoint.checkpointing_steps=1000",
        "train.max_train_steps=100000",
    )
    process = subprocess.Popen(steps, cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    while not (tmp_path / "stopped" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert len(list((tmp_path / "stopped" / "checkpoints").iterdir())) == 1


@pytest.fixture
def handlers():
    """The signals' handlers are put back."""
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("trained", [False, True], ids=["after training", "after a resume"])
def test_a_signal_while_the_end_is_measured_stops_at_once(settings, monkeypatch, handlers, trained):
    if trained:
        run(settings())

    def finish(task, steps):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)
        pytest.fail("it went on")

    monkeypatch.setattr(dreambooth.DreamBooth, "finish", finish)
    with pytest.raises(Interrupted):
        run(settings())
    assert (settings().output_dir / "checkpoints/step-000006").is_dir()


def test_a_signal_in_the_last_save_stops_the_run_after_it(settings, monkeypatch, handlers):
    save = callbacks.save_checkpoint

    def signalled(config, task, accelerator, state, prune):
        save(config, task, accelerator, state, prune)
        if state.step == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(callbacks, "save_checkpoint", signalled)
    with pytest.raises(Interrupted):
        run(settings())
    assert read_checkpoint(settings().output_dir / "checkpoints/step-000006")
