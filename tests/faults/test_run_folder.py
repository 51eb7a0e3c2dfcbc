"""One run at a time in a folder, and checkpoints by the clock and by signal."""

import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from tests.shared.disturbed_runs import names, until
from tests.shared.processes import start
from trainers.config import loading
from trainers.errors import UserError
from trainers.run import run
from trainers.training import callbacks
from trainers.training.checkpoint import read_checkpoint


def test_a_folder_in_use_is_refused_until_kill_9_frees_it_and_sigusr1_makes_a_checkpoint(
    make, tmp_path
):
    settings, log = (
        make("train.max_train_steps=100000", "checkpoint.checkpointing_steps=100000"),
        tmp_path / "log",
    )
    (tmp_path / "config.yaml").write_text(loading.dump_config(settings))
    for number, status in ((signal.SIGKILL, -9), (signal.SIGUSR1, 138)):
        process = start("train.py", tmp_path / "config.yaml", log=log)
        while process.is_alive() and not (settings.output_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        with pytest.raises(
            UserError, match=rf"^output_dir: .* is in use \(process {process.pid} on .+\): wait"
        ) as message:
            run(until(settings, 1))
        assert message.value.status == 2
        assert not (settings.output_dir / "checkpoints").exists()
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == status, log.read_text()
        (settings.output_dir / "metrics.jsonl").unlink()
    assert [
        bool(read_checkpoint(settings.output_dir / "checkpoints" / name))
        for name in names(settings)
    ] == [True]
    assert re.search(
        r"\nstopped by signal 10; the same command goes on from the checkpoint step-\d{6} "
        r"\(python \S*train\.py .*\)\n$",
        log.read_text(),
    )


@pytest.mark.parametrize("place", ["file/run", "file", "disk/run"])
def test_an_output_dir_that_cannot_be_written_to_is_the_users_mistake(make, tmp_path, disk, place):
    (tmp_path / "file").touch()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    wanted = (
        rf"output_dir: cannot write to {tmp_path}/{place} \((Not a directory|File "
        rf"exists|Read-only file system)\)$"
    )
    with pytest.raises(UserError, match=wanted) as message:
        run(make(f"output_dir={tmp_path}/{place}"))
    assert message.value.status == 2


@pytest.mark.parametrize(("minutes", "steps"), [(1, [2, 4, 6]), (1e-9, [1, 2, 3, 4, 5, 6])])
def test_checkpoints_come_after_so_many_minutes(make, disturb, monkeypatch, minutes, steps):
    """Each step takes 40 seconds."""
    settings, done = (
        make(f"checkpoint.every_minutes={minutes}", "checkpoint.checkpointing_steps=100"),
        [],
    )
    clock = SimpleNamespace(monotonic=lambda: 40.0 * len(done), perf_counter=time.perf_counter)
    monkeypatch.setattr(callbacks, "time", clock)
    disturb(dict.fromkeys(range(6), done.append))
    run(settings)
    assert names(settings) == [f"step-{step:06d}" for step in steps]
