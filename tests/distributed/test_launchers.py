"""A signal reaches the training whoever it was sent to, and nothing is left."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tests.shared.processes import ROOT
from tests.shared.runs import environment
from trainers.config import loading
from trainers.run import run
from trainers.run_folder import list_checkpoints
from trainers.training.checkpoint import read_checkpoint

ACCELERATE = [sys.executable, Path(sys.executable).with_name("accelerate"), "launch"]
FORMS = {
    "python": [sys.executable],
    "accelerate, 1 process": [*ACCELERATE, "--cpu", "--num_processes", "1"],
    "accelerate, 2 processes": [*ACCELERATE, "--multi_gpu", "--num_processes", "2"],
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL]
MOMENTS = ("while importing", "while training")
TARGETS = ("launcher", "worker", "group", "everyone")
# a hangup comes from a terminal; a scheduler that reaches everyone sends SIGTERM
ALL_CASES = [
    (form, moment, number, target)
    for form, moment, number, target in itertools.product(FORMS, MOMENTS, SIGNALS, TARGETS)
    if (target != "everyone" or number == signal.SIGTERM)
    and (target == "group" or number != signal.SIGHUP)
    # without a launcher a process is its own worker and its own group
    and (target == "group" or form != "python")
]
FEW_CASES = [
    ("python", "while importing", signal.SIGINT, "group"),
    pytest.param(
        ("accelerate, 1 process", "while training", signal.SIGTERM, "launcher"),
        marks=pytest.mark.slow,
    ),
    ("accelerate, 2 processes", "while training", signal.SIGUSR1, "launcher"),
]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launch:
    """A training that would not end by itself, under one of the forms."""

    def __init__(self, form, settings, folder):
        self.output_dir, self.log = settings.output_dir, folder / "log"
        (folder / "endless.yaml").write_text(loading.dump_config(settings))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [*FORMS[form], "scripts/train.py", folder / "endless.yaml"]
        if form.endswith("processes"):
            command[-2:-2] = ["--main_process_port", str(port)]
        with open(self.log, "wb") as log:
            self.launcher = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.count = 2 if form.endswith("processes") else 1
        self.workers = [psutil.Process(self.launcher.pid)] if form == "python" else []
        if not self.workers:
            wait_until(lambda: len(self.find_workers()) == self.count)
            self.workers = self.find_workers()

    def find_workers(self):
        try:
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            return [child for child in children if "scripts/train.py" in child.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, moment):
        if moment == "while training":
            wait_until((self.output_dir / "metrics.jsonl").exists)
        else:
            # a process that has not begun with the script yet ends without a word
            for worker in self.workers:
                wait_until(lambda at=worker: any("libtorch" in m.path for m in at.memory_maps()))

    def send(self, number, target):
        if target == "group":
            os.killpg(self.launcher.pid, number)
            return
        victims = {"launcher": [self.launcher], "worker": [self.workers[-1]]}
        for victim in victims.get(target, [self.launcher, *self.workers]):
            os.kill(victim.pid, number)

    def wait_for_end(self):
        """The launcher's exit status, once no process is left."""
        status = self.launcher.wait(90)
        wait_until(lambda: not any(map(is_alive, self.workers)), 90)
        return status

    def messages(self):
        return [line for line in self.text().splitlines() if line.startswith("stopped by signal")]

    def text(self):
        return self.log.read_text()


@pytest.fixture
def launch(settings, tmp_path):
    """A function: form -> a Launch; whatever is left of it is killed at the end."""
    launches = []

    def start(form):
        endless = settings(
            "train.train_batch_size=1",
            "train.max_train_steps=100000",
            "checkpoint.checkpointing_steps=100000",
        )
        launches.append(Launch(form, endless, tmp_path))
        return launches[-1]

    yield start
    for launched in launches:
        for process in [launched.launcher, *launched.workers]:
            try:
                process.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        launched.launcher.wait()


def is_killed(form, number, target):
    """Whether a process that trains is killed outright, which it cannot answer."""
    # torchrun gives each worker a group of its own
    is_reached = target == "worker" or (target == "group" and not form.endswith("processes"))
    return number == signal.SIGKILL and is_reached


def check(launched, case, record=None):
    form, moment, number, target = case
    launched.wait_for(moment)
    launched.send(number, target)
    status = launched.wait_for_end()
    checkpoints = list_checkpoints(launched.output_dir / "checkpoints")
    if record:
        record(case, status, checkpoints, launched)
    if form == "python":
        assert status == (-9 if number == signal.SIGKILL else 128 + number)
    if is_killed(form, number, target):
        assert not launched.messages() or form.endswith("processes")
    else:
        assert len(launched.messages()) == 1, launched.text()[-3000:]
    if moment == "while importing":
        assert not launched.output_dir.exists()
    elif not is_killed(form, number, target):
        assert [bool(read_checkpoint(folder)) for folder in checkpoints] == [True]
    if launched.output_dir.exists():
        # a killed process frees its files when the last of its threads has ended
        with FileLock(launched.output_dir / ".lock", timeout=30):
            pass
    return checkpoints


def name(case):
    form, moment, number, target = case
    return f"{form}, {moment}, {number.name} to {target}"


@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_a_signal_stops_the_training_whoever_it_was_sent_to(launch, settings, case):
    checkpoints = check(launch(case[0]), case)
    if checkpoints:
        step = int(checkpoints[0].name.removeprefix("step-"))
        batch = "train.train_batch_size=2" if case[0].endswith("processes") else ""
        run(settings(batch or "train.train_batch_size=1", f"train.max_train_steps={step + 1}"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids=name)
def test_every_signal_to_every_process_under_every_launcher(launch, case):
    check(launch(case[0]), case, print_row)


def print_row(case, status, checkpoints, launched):
    saved = "saved" if checkpoints else "no checkpoint"
    told = "; ".join(launched.messages()) or "nothing"
    print(f"ROW| {name(case)} | {status} | {saved} | {told} | {len(launched.text().splitlines())}")
