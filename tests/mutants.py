"""Break one line of the toolkit at a time, and see which test notices.

python tests/mutants.py          (every fault of mutants.yaml)
python tests/mutants.py shift t5 (those whose file or name has one of these words)

Exit status 1: the tests fail without a fault, a fault survives, or its line is no longer there.
"""

import gc
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests/mutants.yaml"
NOT_COPIED = (".*", "__pycache__", "runs", "*.egg-info")
LIBRARIES = [  # imported once, and inherited by every child
    "accelerate",
    "datasets",
    "peft",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
]


class Mutant(NamedTuple):
    """file: under trainers/; old: a text that it has once; tests: files under tests/ that should
    notice when `new` stands in its place."""

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutants() -> list[Mutant]:
    return [
        Mutant(file, name, fault["old"], fault["new"], tuple(entry["tests"]))
        for file, entry in yaml.safe_load(TABLE.read_text("utf-8")).items()
        for name, fault in entry["faults"].items()
    ]


class FirstFailure:
    """A pytest plugin."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("tests/")

    pytest_collectreport = pytest_runtest_logreport


def judge(root: Path, tests: list[str], answer: Connection) -> None:
    """In a child: the first failing test of the copy in `root`, or "", and pytest's exit status."""
    os.chdir(root)
    os.environ["PYTHONPATH"] = sys.path[0] = str(root)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import trainers

    assert Path(trainers.__file__).is_relative_to(root), trainers.__file__
    first = FirstFailure()
    paths = [f"tests/{test}" for test in tests]
    status = pytest.main(["-x", "-p", "no:cacheprovider", *paths], [first])
    answer.send((first.name, status))


def first_failure(root: Path, tests: list[str]) -> tuple[str, int]:
    """The first failing test or "", and pytest's exit status."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=judge, args=(root, tests, theirs))
    child.start()
    theirs.close()
    answer = ours.recv()
    child.join()
    return answer


def verdict(root: Path, mutant: Mutant) -> str:
    """What becomes of one mutant in the copy in `root`, which is then as it was."""
    path = root / "trainers" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"NOT APPLIED: its text is there {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    failed, status = first_failure(root, list(mutant.tests))
    path.write_text(text)
    if failed:
        return f"caught by {failed}"
    if status == pytest.ExitCode.OK:
        return "SURVIVED"
    # no test notices what keeps the tests from starting, as a syntax error does
    return f"NO TEST RAN: pytest ended with {status!r}"


def verdicts(root: Path, mutants: list[Mutant]) -> Iterator[str]:
    for mutant in mutants:
        start = time.perf_counter()
        text = verdict(root, mutant)
        seconds = time.perf_counter() - start
        print(f"{mutant.file:17} {mutant.name:40} {seconds:4.0f} s  {text}", flush=True)
        yield text


def prepare() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    # two faults of one length within one second would share their bytecode
    sys.dont_write_bytecode = True
    gc.freeze()


def main(words: list[str]) -> int:
    mutants = [
        mutant
        for mutant in read_mutants()
        if not words or any(word in f"{mutant.file} {mutant.name}" for word in words)
    ]
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "copy"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        needed = sorted({test for mutant in mutants for test in mutant.tests})
        failed, status = first_failure(root, needed)
        if status != pytest.ExitCode.OK:
            print(f"without any fault, pytest ends with {status!r} {failed}")
            return 1
        caught = sum(text.startswith("caught") for text in verdicts(root, mutants))
    print(f"{caught} of {len(mutants)} caught")
    return int(caught < len(mutants))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
