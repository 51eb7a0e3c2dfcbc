"""Hit runs of every trainer with signals at random moments, go on with other numbers of processes,
compare the ends.

python tests/drill.py [--kills 50] [--seed 0] [--out FOLDER]

The seed decides what is drawn; what a signal interrupts depends on the machine too. Exit status 1:
a process hung, a checkpoint is unreadable, an exit status or a message is wrong, or a run ended
otherwise than an undisturbed one.
"""

import argparse
import gc
import itertools
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

from tests.shared import processes
from tests.shared.drilled_runs import Start, config_maker
from tests.shared.small_runs import KINDS, losses, state
from tests.shared.tiny_pipelines import MAKERS
from trainers.run_folder import list_checkpoints
from trainers.training.checkpoint import read_checkpoint

SIGNALS = [SIGKILL, SIGTERM, SIGUSR1]
GRACE = 60  # seconds that a process has to end
# a GAN's penalty jumps at the kinks of leaky ReLUs
ATOL = {"autoencoder": 1e-5, "segment": 1e-5, "pix2pix": 1e-5}
UNEQUAL = "unequal results"
FAULTS = ["hangs", "unreadable checkpoints", "wrong statuses", "bad messages", UNEQUAL]
COLUMNS = [
    *(number.name for number in SIGNALS),
    "starts",
    "on 1",
    "on 2",
    "on 4",
    "runs",
    "in one process",
    "to the bit",
    "deviation",
    "left to a launcher",
    *FAULTS,
]


def prepare() -> None:
    # the server imports these for all of its processes, and needs to find them
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes.server.set_forkserver_preload(
        ["trainers.run", "torchmetrics", "tests.shared.drilled_runs"]
    )
    gc.freeze()


def shape_of_start(r, settings, maximum):
    """How many processes, and how many micro-batches of each."""
    world = r.choice([1, 2, 4]) if maximum > 1 else 1
    if maximum > 1 and settings.can_accumulate:
        return world, r.choice([1, settings.train.train_batch_size // world])
    return world, 1


def found_faults(start, statuses, phase, number, hit):
    """Fault -> cases, of a start that has ended."""
    hung = [rank for rank, status in enumerate(statuses) if status is None and phase != "meeting"]
    wrong = start.wrong(number, hit, phase, statuses) if phase else [s for s in statuses if s]
    checkpoints = list_checkpoints(start.folder / "checkpoints")
    broken = [path.name for path in checkpoints if not read_checkpoint(path)]
    return dict(zip(FAULTS, (hung, broken, wrong, [*start.complaints(statuses)]), strict=False))


def disturb(r, settings, kills, tally, hits):
    """Start a run until it ends, with so many signals; the shapes of its starts, and how many
    signals it outran."""
    shapes, maximum = [], r.choice([1, 4, 4])
    while True:
        world, parts = shape_of_start(r, settings, maximum)
        start, phase = Start(settings, len(shapes), world, parts), ""
        number, hit = r.choice(SIGNALS), r.choice([[*range(world)], [r.randrange(world)]])
        pattern, delay = start.moment(r, max(1, kills))
        if kills and (not pattern or start.wait(GRACE, pattern)) and start.wait(delay):
            phase, kills = start.phase(), kills - 1
            for rank in hit:
                with suppress(ProcessLookupError):
                    os.kill(start.ranks[rank].pid, number)
        start.wait({"": 5 * GRACE, "meeting": GRACE / 5}.get(phase, GRACE))
        statuses = start.end()
        found = found_faults(start, statuses, phase, number, hit)
        tally.update({fault: len(cases) for fault, cases in found.items()})
        tally.update({number.name: phase != "", "starts": 1, f"on {world}": 1})
        tally["left to a launcher"] += statuses.count(None) - len(found["hangs"])
        shapes.append((world, parts))
        signal = "no signal"
        if phase:
            moment = f"{pattern} + {delay:.3f} s"
            signal = f"{next(hits)}: {number.name} to {hit} in {phase}, {moment}"
        message = " ".join(f"{fault.upper()} {cases}" for fault, cases in found.items() if cases)
        began = f"{start.folder.name} {world} x {parts} from {start.first}"
        print(f"{began}: {signal}: {statuses} {message}", flush=True)
        if statuses[0] == 0 or not phase:
            return shapes, kills


def tensors_of(settings):
    """Everything that a run wrote: its last checkpoint, its weights and its losses."""
    folder, tensors = settings.output_dir, state(settings)
    for path in (*folder.glob("*.safetensors"), *folder.glob("model/*.safetensors")):
        tensors |= {f"{path.name} {key}": tensor for key, tensor in load_file(path).items()}
    for i, row in enumerate(losses(settings)):
        tensors |= {f"losses {i} {name}": torch.tensor(value) for name, value in row.items()}
    return {name: tensor.double() for name, tensor in tensors.items()}


def compared(whole, run, rtol, atol):
    """The largest deviation among the files (norm of the difference by norm), and the tensors that
    are not equal."""
    one, other = tensors_of(whole), tensors_of(run)
    off, size, unequal = Counter(), Counter(), []
    for name, tensor in (other | one).items():
        first, second = (side.get(name, 0 * tensor) for side in (one, other))
        off[name.split()[0]] += (second - first).square().sum().item()
        size[name.split()[0]] += first.square().sum().item()
        if not torch.allclose(second, first, rtol, atol):
            unequal.append(name)
    return max((off[name] / size[name]) ** 0.5 for name in off), unequal


def drill(trainer, kills, seed, make, hits):
    """Disturb runs of one trainer until it has had so many signals; what was counted."""
    r, tally = random.Random(f"{seed} {trainer}"), Counter()
    whole = make(trainer, "whole", 2)
    Start(whole, 0, 1, 1).wait(5 * GRACE)
    while kills:
        run = make(trainer, f"run-{tally['runs']}", r.choice([1, 2]))
        planned = min(kills, r.randint(2, 4))
        shapes, outrun = disturb(r, run, planned, tally, hits)
        alike = {*shapes} == {(1, 1)}
        tolerance = (0, 0) if alike else (1e-3, ATOL.get(trainer, 1e-4))
        deviation, unequal = compared(whole, run, *tolerance)
        end = f"{run.output_dir.name} ended after {shapes}: deviation {deviation:.1e}"
        print(f"{end} {unequal or ''}", flush=True)
        tally.update({"runs": 1, "in one process": alike, "to the bit": deviation == 0})
        tally[UNEQUAL] += unequal != []
        tally["deviation"] = max(tally["deviation"], deviation)
        kills -= planned - outrun
    return tally


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    prepare()
    root = (arguments.out or Path(tempfile.mkdtemp(prefix="drill-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    make, hits = config_maker(root), itertools.count(1)
    trainers, table = [*MAKERS, *KINDS], {}
    for place, trainer in enumerate(trainers):
        kills = (arguments.kills - 1 - place) // len(trainers) + 1
        table[trainer] = drill(trainer, kills, arguments.seed, make, hits)
    reduced: dict[str, Callable] = {"deviation": max}
    table["total"] = {
        column: reduced.get(column, sum)([tally[column] for tally in table.values()])
        for column in COLUMNS
    }
    (root / "drill.json").write_text(json.dumps(table, indent=2) + "\n")
    print("trainer", *COLUMNS, sep=" | ")
    for trainer, tally in table.items():
        print(trainer, *(f"{tally[column]:.3g}" for column in COLUMNS), sep=" | ")
    return int(any(table["total"][fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
