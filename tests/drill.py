"""Hit runs of every trainer with signals at random moments, go on with other numbers of processes,
compare the ends.

python tests/drill.py [--kills 50] [--seed 0] [--out FOLDER]

The seed decides what is drawn; what a signal interrupts depends on the machine too. Exit status 1:
a process hung, a checkpoint is unreadable, an exit status or a message is wrong, or a run ended
otherwise than an undisturbed one.
"""

import argparse
import gc
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1

import conftest
import processes
import torch
from safetensors.torch import load_file
from test_from_scratch import KINDS, losses, make, measure_quickly, state
from test_training import PRIOR

from trainers.config import loading
from trainers.run_folder import list_checkpoints
from trainers.training.checkpoint import read_checkpoint

SIGNALS, STEPS, GRACE, ROWS = (
    [SIGKILL, SIGTERM, SIGUSR1],
    16,
    60,
    {"gan": 8, "pix2pix": 8},
)  # GRACE: seconds to end
ATOL = {
    "autoencoder": 1e-5,
    "segment": 1e-5,
    "pix2pix": 1e-5,
}  # a GAN's penalty jumps at the kinks of leaky ReLUs
FAULTS = ["hangs", "unreadable checkpoints", "wrong statuses", "bad messages", "unequal results"]
os.environ["PYTHONPATH"] = os.pathsep.join(
    sys.path
)  # of the server, which imports these for all of its processes
gc.freeze()  # in each process, which imports this file: the runs collect garbage often
processes.server.set_forkserver_preload(
    ["trainers.run", "torchmetrics", "test_from_scratch", "test_training"]
)


def recipes(root):
    """A function: trainer, name of the run, steps between checkpoints -> its config, as the tests'
    fixtures make it."""
    names = ("bases", "photos", "settings", "bars", "blobs")
    bases, photos, settings, bars, blobs = (getattr(conftest, name).__wrapped__ for name in names)
    factory = argparse.Namespace(
        mktemp=lambda name: Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    )
    tuned = settings(bases(factory), photos(factory), root)
    small = make.__wrapped__(bars(factory), blobs(factory), factory)

    def recipe(trainer, name, saves):
        overrides = [
            f"train.max_train_steps={STEPS}",
            f"train.train_batch_size={ROWS.get(trainer, 4)}",
        ]
        overrides += [
            f"checkpoint.checkpointing_steps={saves}",
            f"output_dir={root}/{trainer}-{name}",
        ]
        return (
            small(trainer, name, *overrides)
            if trainer in KINDS
            else tuned(*PRIOR, *overrides, family=trainer)
        )

    return recipe


class Start:
    """The processes of one start of a run, and what the run's folder shows of them."""

    def __init__(self, settings, number, world, parts):
        self.saves, self.folder, self.began = (
            settings.checkpoint.checkpointing_steps,
            settings.output_dir,
            time.time(),
        )
        self.weights = (
            "pytorch_lora_weights.safetensors" if settings.kind == "dreambooth" else "model"
        )
        self.first, self.logs = (
            self.saved(),
            [Path(f"{self.folder}-{number}.{rank}") for rank in range(world)],
        )
        path, rows = Path(f"{self.folder}.yaml"), settings.train.train_batch_size // world // parts
        path.write_text(loading.dump_config(settings))
        command = [
            "train.py",
            path,
            f"train.train_batch_size={rows}",
            f"train.gradient_accumulation_steps={parts}",
        ]
        with socket.create_server(("127.0.0.1", 0)) as free:
            group = {
                "WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free.getsockname()[1],
            }
        self.ranks = []
        for rank, log in enumerate(self.logs):
            own = (
                group | {"LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
                if world > 1
                else {}
            )
            self.ranks.append(processes.start(*command, log=log, before=measure_quickly, **own))

    def saved(self):
        return max(
            (int(path.name[-6:]) for path in list_checkpoints(self.folder / "checkpoints")),
            default=0,
        )

    def wrote(self, pattern):
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime >= self.began for path in self.folder.glob(pattern))

    def phase(self):
        if not self.wrote(".lock"):
            return "meeting"
        if self.saved() == STEPS and (self.first < STEPS or self.wrote(self.weights)):
            return "over" if self.wrote("report.html") else "end"
        return "training" if self.wrote("checkpoints/*step-*") else "start-up"

    def wait(self, seconds, pattern="nothing"):
        late = time.monotonic() + seconds
        while (
            time.monotonic() < late
            and any(p.is_alive() for p in self.ranks)
            and not self.wrote(pattern)
        ):
            time.sleep(0.001)
        return all(process.is_alive() for process in self.ranks)

    def complaints(self, statuses):
        """Of processes that end by a traceback, or with status 1 though none is gone."""
        for log, status in zip(self.logs, statuses, strict=True):
            text = log.read_text() if log.exists() else ""
            if "Traceback" in text or (status == 1 and "another process ended" not in text):
                yield f"{log.name}: {' '.join(text.strip().splitlines()[-1:])}"

    def moment(self, r, left):
        """A file to wait for, and the seconds from there; or seconds alone."""
        step = self.first + self.saves * r.randint(
            1, max(1, (STEPS - self.first) // self.saves // left)
        )
        middle = [
            f"checkpoints/{kind}-{n:06d}"
            for kind, n in (("*step", step), ("step", step), ("*step", STEPS))
        ]
        ends = (
            r.choice(["", ".lock", "config.yaml"]),
            r.choice([self.weights, "README.md", "report.html"]),
        )
        pattern = r.choice([*ends, *(2 * middle if self.first < STEPS else [])])
        return pattern, r.uniform(0, 0.05 if pattern else 1 + len(self.ranks))

    def wrong(self, number, hit, phase, statuses):
        """The ranks that end with another exit status than the signal calls for."""
        own = {-number} if number == SIGKILL else {128 + number}
        others = {1} if number == SIGKILL else own if phase == "training" else own | {1}
        own = own | {"meeting": {-number}, "start-up": {-number}, "over": {0}}.get(phase, set())
        others = (
            others | ({0, 1} if self.saved() >= STEPS - self.saves else set()) | {None}
        )  # None is counted apart
        return [
            rank
            for rank, status in enumerate(statuses)
            if status not in (own if rank in hit else others)
        ]


def disturb(r, settings, kills, tally, hits):
    """Start a run until it ends, with so many signals; the shapes of its starts, and how many
    signals it outran."""
    shapes, maximum = [], r.choice([1, 4, 4])
    while True:
        world = r.choice([1, 2, 4]) if maximum > 1 else 1
        parts = (
            r.choice([1, settings.train.train_batch_size // world])
            if maximum > 1 and settings.can_accumulate
            else 1
        )
        start, phase = Start(settings, len(shapes), world, parts), ""
        number, hit = r.choice(SIGNALS), r.choice([[*range(world)], [r.randrange(world)]])
        pattern, delay = start.moment(r, max(1, kills))
        if kills and (not pattern or start.wait(GRACE, pattern)) and start.wait(delay):
            phase, kills = start.phase(), kills - 1
            for rank in hit:
                with suppress(ProcessLookupError):
                    os.kill(start.ranks[rank].pid, number)
        start.wait({"": 5 * GRACE, "meeting": GRACE / 5}.get(phase, GRACE))
        statuses = [process.exitcode for process in start.ranks]
        for process in start.ranks:
            process.kill()
            process.join()
        hung = [
            rank for rank, status in enumerate(statuses) if status is None and phase != "meeting"
        ]
        amiss = start.wrong(number, hit, phase, statuses) if phase else [s for s in statuses if s]
        broken = [
            path.name
            for path in list_checkpoints(start.folder / "checkpoints")
            if not read_checkpoint(path)
        ]
        found = dict(
            zip(FAULTS, (hung, broken, amiss, [*start.complaints(statuses)]), strict=False)
        )
        tally.update(
            {fault: len(cases) for fault, cases in found.items()} | {number.name: phase != ""}
        )
        tally.update(
            {"starts": 1, f"on {world}": 1, "left to a launcher": statuses.count(None) - len(hung)}
        )
        shapes.append((world, parts))
        signal = (
            f"{next(hits)}: {number.name} to {hit} in {phase}, {pattern} + {delay:.3f} s"
            if phase
            else "no signal"
        )
        message = " ".join(f"{fault.upper()} {cases}" for fault, cases in found.items() if cases)
        print(
            f"{start.folder.name} {world} x {parts} from {start.first}: {signal}: {statuses} "
            f"{message}",
            flush=True,
        )
        if statuses[0] == 0 or not phase:
            return shapes, kills


def compared(whole, run, rtol, atol):
    """The largest deviation among the files (norm of the difference by norm), and the tensors that
    are not equal."""
    sides, off, size = [], Counter(), Counter()
    for settings in (whole, run):
        folder, tensors = settings.output_dir, state(settings)
        for path in (*folder.glob("*.safetensors"), *folder.glob("model/*.safetensors")):
            tensors |= {f"{path.name} {key}": tensor for key, tensor in load_file(path).items()}
        for i, row in enumerate(losses(settings)):
            tensors |= {f"losses {i} {name}": torch.tensor(value) for name, value in row.items()}
        sides.append({name: tensor.double() for name, tensor in tensors.items()})
    pairs = {
        name: [side.get(name, 0 * tensor) for side in sides]
        for name, tensor in (sides[1] | sides[0]).items()
    }
    for name, (one, other) in pairs.items():
        off[name.split()[0]] += (other - one).square().sum().item()
        size[name.split()[0]] += one.square().sum().item()
    unequal = [
        name for name, (one, other) in pairs.items() if not torch.allclose(other, one, rtol, atol)
    ]
    return max((off[name] / size[name]) ** 0.5 for name in off), unequal


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("--kills", 50),
        ("--seed", 0),
        ("--out", tempfile.mkdtemp(prefix="drill-")),
    ):
        parser.add_argument(name, type=type(default), default=default)
    arguments = parser.parse_args()
    (root := Path(arguments.out).resolve()).mkdir(parents=True, exist_ok=True)
    recipe, hits = recipes(root), iter(range(1, arguments.kills + 1))
    table = {trainer: Counter() for trainer in [*conftest.MAKERS, *KINDS]}
    for place, (trainer, tally) in enumerate(table.items()):
        r, left = (
            random.Random(f"{arguments.seed} {trainer}"),
            (arguments.kills - 1 - place) // len(table) + 1,
        )
        Start(whole := recipe(trainer, "whole", 2), 0, 1, 1).wait(5 * GRACE)
        while left:
            run, kills = (
                recipe(trainer, f"run-{tally['runs']}", r.choice([1, 2])),
                min(left, r.randint(2, 4)),
            )
            shapes, outrun = disturb(r, run, kills, tally, hits)
            alike = {*shapes} == {(1, 1)}
            deviation, unequal = compared(
                whole, run, *((0, 0) if alike else (1e-3, ATOL.get(trainer, 1e-4)))
            )
            print(
                f"{run.output_dir.name} ended after {shapes}: deviation {deviation:.1e} "
                f"{unequal or ''}",
                flush=True,
            )
            tally.update(
                {
                    "runs": 1,
                    "in one process": alike,
                    "to the bit": deviation == 0,
                    FAULTS[-1]: unequal != [],
                }
            )
            tally["deviation"], left = max(tally["deviation"], deviation), left - kills + outrun
    columns = [
        *(number.name for number in SIGNALS),
        "starts",
        "on 1",
        "on 2",
        "on 4",
        "runs",
        "in one process",
    ]
    columns += ["to the bit", "deviation", "left to a launcher", *FAULTS]
    table["total"] = {
        c: (max if c == "deviation" else sum)(tally[c] for tally in table.values()) for c in columns
    }
    (root / "drill.json").write_text(json.dumps(table, indent=2) + "\n")
    print("trainer", *columns, sep=" | ")
    for trainer, tally in table.items():
        print(trainer, *(f"{tally[column]:.3g}" for column in columns), sep=" | ")
    return int(any(table["total"][fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
