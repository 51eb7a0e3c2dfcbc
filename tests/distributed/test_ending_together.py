"""Several processes stop together, and none is left behind when one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.shared.processes import ROOT, group
from tests.shared.runs import assert_close, environment
from trainers.config import loading
from trainers.run import run
from trainers.run_folder import list_checkpoints
from trainers.training.checkpoint import read_checkpoint

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


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


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.parametrize(
    ("victim", "environment"),
    [
        pytest.param(0, {}, id="first, DDP"),
        pytest.param(1, FSDP, id="second, FSDP2"),
        pytest.param(1, {}, id="second, DDP", marks=pytest.mark.slow),
        pytest.param(0, FSDP, id="first, FSDP2", marks=pytest.mark.slow),
    ],
)
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


def test_a_mistake_that_one_process_finds_ends_all_and_is_reported_once(long, tmp_path):
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
