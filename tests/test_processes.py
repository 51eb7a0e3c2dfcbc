"""Laws of several processes: the same training whatever their number, a cut base, stopping
together, dying alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from oracles import assert_trained_alike
from processes import group, launch
from safetensors.torch import load_file
from test_training import PRIOR, ROOT, environment, losses

from trainers.config import loading
from trainers.distributed import collectives
from trainers.distributed.accelerator import make_accelerator
from trainers.distributed.collectives import own_items, run_across_processes
from trainers.errors import UserError
from trainers.run import run
from trainers.run_folder import list_checkpoints
from trainers.training.checkpoint import read_checkpoint

FAMILIES = ("sd15", "sd3", "flux")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def lora(settings):
    return load_file(settings.output_dir / "pytorch_lora_weights.safetensors")


def assert_close(one, other):
    assert_trained_alike(
        (losses(one), losses(other)), (lora(one), lora(other)), one.optimizer.learning_rate
    )


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
def test_one_two_and_four_processes_train_alike(trained, settings, tmp_path, family):
    one = settings(
        "train.train_batch_size=1", "train.gradient_accumulation_steps=4", *PRIOR, family=family
    )
    run(one)
    for world in (2, 4):
        parts = (
            "train.train_batch_size=1",
            f"train.gradient_accumulation_steps={4 // world}",
            *PRIOR,
        )
        assert_close(one, trained(f"of-{world}", world, *parts, family=family)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_is_cut_among_two_processes_trains_and_samples_like_a_whole_one(
    trained, settings, family
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
        f"data.held_out_dir={settings().data.instance_data_dir}",
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
def test_a_base_in_four_bits_can_be_cut_too(trained, settings, family):
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


def test_a_cut_base_samples_what_a_whole_one_samples(trained):
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
def test_a_cut_that_cannot_be_made_is_refused(
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


# Stopping together, dying alone


@pytest.fixture
def long(settings, tmp_path):
    """The config of a run of two processes that does not end by itself."""
    endless = settings(
        "train.train_batch_size=1",
        "train.max_train_steps=100000",
        "checkpoint.checkpointing_steps=5",
    )
    (tmp_path / "long.yaml").write_text(loading.dump_config(endless))
    return endless


def started(settings, tmp_path, **environment):
    """Its two processes, once they have written a checkpoint."""
    ranks = group(
        "train.py", tmp_path / "long.yaml", log=tmp_path / "log", processes=2, **environment
    )
    while not list_checkpoints(settings.output_dir / "checkpoints") and all(
        rank.is_alive() for rank in ranks
    ):
        time.sleep(0.01)
    return ranks


def ended(ranks):
    for rank in ranks:
        rank.join(60)
    return [rank.exitcode for rank in ranks]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(long, settings, tmp_path, number):
    ranks = started(long, tmp_path)
    os.kill(ranks[1].pid, number)
    assert ended(ranks) == [128 + number] * 2
    newest = list_checkpoints(long.output_dir / "checkpoints")[0]
    assert read_checkpoint(newest)
    steps = json.loads((long.output_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert newest.name == f"step-{steps:06d}"
    run(settings("train.train_batch_size=2", f"train.max_train_steps={steps + 2}"))
    whole = settings(
        "train.train_batch_size=2",
        f"train.max_train_steps={steps + 2}",
        f"output_dir={tmp_path}/whole",
    )
    run(whole)
    assert_close(whole, long)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_when_one_process_is_killed_the_other_ends_with_a_message_and_the_run_goes_on(
    long, settings, tmp_path, victim, environment
):
    ranks = started(long, tmp_path, **environment)
    ranks[victim].kill()
    statuses = ended(ranks)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 1
    printed = (tmp_path / f"log.{1 - victim}").read_text()
    assert "another process ended or hangs" in printed
    assert "the same command goes on from it" in printed
    assert "Traceback" not in printed
    newest = list_checkpoints(long.output_dir / "checkpoints")[0]
    steps = int(newest.name.removeprefix("step-"))
    run(settings("train.train_batch_size=2", f"train.max_train_steps={steps + 1}"))


def test_a_mistake_that_one_process_finds_ends_all_and_is_told_once(long, tmp_path):
    first = started(long, tmp_path)
    second = group("train.py", tmp_path / "long.yaml", log=tmp_path / "second", processes=2)
    assert ended(second) == [2, 2]
    printed = [(tmp_path / f"second.{rank}").read_text() for rank in range(2)]
    assert f"is in use (process {first[0].pid} on {socket.gethostname()})" in printed[0]
    assert "in use" not in printed[1]
    for rank in first:
        rank.kill()
    ended(first)


@pytest.mark.slow
def test_the_slurm_script_queues_a_stopped_run_again_and_a_finished_one_not(settings, tmp_path):
    """With an srun that starts two tasks here and, when asked, sends them what SLURM sends before
    the time is over."""
    start = (
        f'SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" > {tmp_path}/task.$rank 2>&1 & '
        f'pids="$pids $!"'
    )
    saved = f"ls -d {tmp_path}/run/checkpoints/step-* > /dev/null 2>&1"
    srun = f"""
for rank in 0 1; do {start}; done
if [ -n "$STOPPED" ]; then until {saved}; do sleep 0.1; done; kill -USR1 $pids; fi
worst=0
for pid in $pids; do wait $pid; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst"""
    scontrol = (
        f'case "$1" in show) echo 127.0.0.1 ;; *) echo "$@" >> {tmp_path}/scontrol.log ;; esac'
    )
    tools = {"srun": srun, "scontrol": scontrol, "python": f'exec {sys.executable} "$@"'}
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.yaml").write_text(
        loading.dump_config(
            settings("train.train_batch_size=1", "checkpoint.checkpointing_steps=1")
        )
    )
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    job = [ROOT / "scripts/train.sbatch", tmp_path / "job.yaml"]
    known = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **slurm) | {
        "ACCELERATE_MIXED_PRECISION": "no"
    }
    stopped = subprocess.run(
        [*job, "train.max_train_steps=100000"], cwd=ROOT, env=known | {"STOPPED": "1"}, timeout=200
    )
    assert stopped.returncode == 138, (tmp_path / "task.0").read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    steps = int(list_checkpoints(tmp_path / "run/checkpoints")[0].name.removeprefix("step-")) + 2
    finished = subprocess.run(
        [*job, f"train.max_train_steps={steps}"], cwd=ROOT, env=known, timeout=200
    )
    assert finished.returncode == 0, (tmp_path / "task.0").read_text()
    assert "resumed from" in (tmp_path / "task.0").read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
