"""Cases made at random but from a seed, each tried in a process of its own, within limits.

A case ends as accepted, or refused in a message; everything else is a fault.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.errors import UserError

MAX_LINE = 1500
MAX_LINES = 30
MAX_GROWTH = 4 * 2**20  # KiB of memory that a case may add
OUTCOMES = ("accepted", "refused")
PROGRAM_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


@dataclass(frozen=True)
class Case:
    """What is tried: `check` gets an empty folder and returns "accepted", or what is wrong.

    It may raise UserError, which is a refusal.
    """

    name: str
    check: Callable[[Path], str]


@dataclass
class Result:
    """How many cases ended in which way, and the faults by the number and name of their case."""

    counts: Counter[str]
    faults: dict[str, str]


class ProgramStartedError(BaseException):
    """A file made the toolkit start another program."""


def fuzz(
    cases: Iterable[Case], seconds: float, only: int | None = None, minutes: float = math.inf
) -> Result:
    """Try every case, or the one with the number `only`, whose output is then shown.

    seconds: how long one may take; minutes: after which no further one is tried.
    """
    result, end = Result(Counter(), {}), time.monotonic() + 60 * minutes
    for number, case in enumerate(cases):
        if time.monotonic() > end:
            break
        if only is not None and number != only:
            continue
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            outcome = try_alone(case, Path(folder), seconds, quiet=only is None)
        if only is not None:
            print(case.name, outcome)
        if outcome not in OUTCOMES:
            result.faults[f"{number} {case.name}"] = outcome
            outcome = "fault"
        result.counts[outcome] += 1
    return result


def try_alone(case: Case, folder: Path, seconds: float, quiet: bool = True) -> str:
    """The outcome of a case in a fork of this process, which is killed after `seconds`."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            if quiet:
                silence()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = outcome_of(case, folder)
            os.write(writing, outcome.encode("utf-8", "replace")[:20_000])
        finally:
            os._exit(0)
    os.close(writing)
    answers, _, _ = select.select([reading], [], [], seconds)
    if not answers:
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as pipe:
        outcome = pipe.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(child, 0)
    if not answers:
        return "a hang"
    if status:
        return f"the process died by signal {os.WTERMSIG(status)}"
    growth = usage.ru_maxrss - resident_memory()
    return f"it took {growth / 2**20:.1f} GiB" if growth > MAX_GROWTH else outcome


def resident_memory() -> int:
    """Of this process, in KiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def silence() -> None:
    """Throw away what this process and its libraries print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def outcome_of(case: Case, folder: Path) -> str:
    """accepted, refused, or the fault; to be called in a process of its own."""
    gc.freeze()  # the toolkit collects garbage, and what this process inherited is none
    sys.addaudithook(refuse_programs)
    try:
        return case.check(folder)
    except UserError as error:
        lines = str(error).splitlines()
        is_clear = 0 < len(lines) <= MAX_LINES and all(0 < len(x) < MAX_LINE for x in lines)
        return "refused" if is_clear else f"an unclear message: {error}"
    except BaseException:
        return f"a traceback: {traceback.format_exc()}"


def refuse_programs(event: str, arguments: tuple) -> None:
    if event in PROGRAM_EVENTS:
        raise ProgramStartedError(f"{event} {arguments}")


# Damage that any file may have


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data))))]


def flip_bits(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Some bits, of the first `end` bytes only if that is given."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(min(len(data), end or len(data)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_header(data: bytes, rng: random.Random) -> bytes:
    return flip_bits(data, rng, 200)


def blank(data: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros, as a disk may leave it."""
    start = rng.randrange(len(data))
    length = min(rng.choice((1, 16, 512, 4096)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b"\n", b"x" * 100, data))


def replace_all(data: bytes, rng: random.Random) -> bytes:
    """Other content of some known or unknown kind."""
    return rng.choice(
        (b"", b"{}", b"null", b"PK\x03\x04", b"\x80\x02.", b"\xff" * 64, rng.randbytes(300))
    )


CONTENT_DAMAGE = (truncate, flip_bits, flip_in_header, blank, append, replace_all)


def replace_path(path: Path, rng: random.Random) -> str:
    """Something else under the name of a file: its kind."""
    path.unlink()
    kind = rng.choice(("nothing", "a folder", "a pipe", "a link to nothing", "a link to itself"))
    if kind == "a folder":
        path.mkdir()
        (path / "file").write_bytes(b"x")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("gone"))
    elif kind == "a link to itself":
        path.symlink_to(path)
    return kind


def copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)


def main(
    description: str,
    make_cases: Callable[[Path, int, int], Iterator[Case]],
    seconds: float,
    default_count: int,
) -> int:
    """The command line of a fuzzer; 1 for a fault. make_cases: of a folder, a count and a seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=default_count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="The number of one case, to see all of it.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Then it ends.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder), arguments.cases, arguments.seed)
        result = fuzz(cases, seconds, arguments.only, arguments.minutes)
    for name, fault in list(result.faults.items())[:20]:
        print(name, fault, "\n")
    print(", ".join(f"{name}: {result.counts[name]}" for name in (*OUTCOMES, "fault")))
    return 1 if result.faults else 0
