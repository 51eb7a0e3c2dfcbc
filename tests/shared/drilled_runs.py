"""Runs of every trainer in one or several processes, a random moment of each, and what is wrong
with its end."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

from tests.shared import image_sets, processes, runs, small_runs
from tests.shared.small_runs import KINDS, measure_quickly
from tests.shared.tiny_pipelines import SavedPipelines
from trainers.config import loading
from trainers.config.base import Config
from trainers.run_folder import list_checkpoints

STEPS = 16
ROWS = {"gan": 8, "pix2pix": 8}


def config_maker(root: Path) -> Callable[[str, str, int], Config]:
    """A function: trainer, name of the run, steps between checkpoints -> its config, as the tests'
    fixtures make it."""

    def make_folder(name):
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))

    photos = image_sets.write_photos(make_folder("photos"))
    bars = image_sets.write_bars(make_folder("bars"))
    blobs = image_sets.write_blobs(make_folder("blobs"))
    tuned = runs.config_maker(SavedPipelines(make_folder), photos, root)
    small = small_runs.config_maker(bars, blobs, make_folder("runs"))

    def make(trainer, name, saves):
        overrides = [
            f"train.max_train_steps={STEPS}",
            f"train.train_batch_size={ROWS.get(trainer, 4)}",
            f"checkpoint.checkpointing_steps={saves}",
            f"output_dir={root}/{trainer}-{name}",
        ]
        if trainer in KINDS:
            return small(trainer, name, *overrides)
        return tuned(*runs.PRIOR, *overrides, family=trainer)

    return make


class Start:
    """The processes of one start of a run, and what the run's folder shows of them.

    number: how often the run was started before; world: processes; parts: micro-batches of each.
    """

    def __init__(self, settings, number, world, parts):
        self.saves = settings.checkpoint.checkpointing_steps
        self.folder = settings.output_dir
        self.began = time.time()
        dreambooth = settings.kind == "dreambooth"
        self.weights = "pytorch_lora_weights.safetensors" if dreambooth else "model"
        self.first = self.saved()
        self.logs = [Path(f"{self.folder}-{number}.{rank}") for rank in range(world)]
        path = Path(f"{self.folder}.yaml")
        path.write_text(loading.dump_config(settings))
        rows = settings.train.train_batch_size // world // parts
        arguments = [
            path,
            f"train.train_batch_size={rows}",
            f"train.gradient_accumulation_steps={parts}",
        ]
        log, before = f"{self.folder}-{number}", measure_quickly
        if world > 1:
            self.ranks = processes.group(
                "train.py", *arguments, log=log, processes=world, before=before
            )
        else:
            self.ranks = [processes.start("train.py", *arguments, log=f"{log}.0", before=before)]

    def saved(self):
        """The last step with a checkpoint, or 0."""
        paths = list_checkpoints(self.folder / "checkpoints")
        return max((int(path.name[-6:]) for path in paths), default=0)

    def wrote(self, pattern):
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime >= self.began for path in self.folder.glob(pattern))

    def is_finished(self):
        """Whether the end of this process's run is noted."""
        name = "status.json"
        return self.wrote(name) and '"state": "finished"' in (self.folder / name).read_text()

    def phase(self):
        if not self.wrote(".lock"):
            return "meeting"
        if self.saved() == STEPS and (self.first < STEPS or self.wrote(self.weights)):
            return "over" if self.is_finished() else "end"
        return "training" if self.wrote("checkpoints/*step-*") else "start-up"

    def wait(self, seconds, pattern="nothing"):
        """Until a file was written, no process is left or time is over; whether all are alive."""
        late = time.monotonic() + seconds
        while (
            time.monotonic() < late
            and any(process.is_alive() for process in self.ranks)
            and not self.wrote(pattern)
        ):
            time.sleep(0.001)
        return all(process.is_alive() for process in self.ranks)

    def end(self):
        """The exit status of each process, None for one that had to be killed."""
        statuses = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        return statuses

    def complaints(self, statuses) -> Iterator[str]:
        """Of processes that end by a traceback, or with status 1 though none is gone."""
        for log, status in zip(self.logs, statuses, strict=True):
            text = log.read_text() if log.exists() else ""
            if "Traceback" in text or (status == 1 and "another process ended" not in text):
                yield f"{log.name}: {' '.join(text.strip().splitlines()[-1:])}"

    def moment(self, r, left):
        """A file to wait for, and the seconds from there; or seconds alone."""
        saves_left = (STEPS - self.first) // self.saves // left
        step = self.first + self.saves * r.randint(1, max(1, saves_left))
        during = [
            f"checkpoints/*step-{step:06d}",
            f"checkpoints/step-{step:06d}",
            f"checkpoints/*step-{STEPS:06d}",
        ]
        early = r.choice(["", ".lock", "config.yaml"])
        late = r.choice([self.weights, "README.md", "report.html"])
        pattern = r.choice([early, late, *(2 * during if self.first < STEPS else [])])
        return pattern, r.uniform(0, 0.05 if pattern else 1 + len(self.ranks))

    def wrong(self, number, hit, phase, statuses):
        """The ranks that end with another exit status than the signal calls for."""
        own = {-number} if number == SIGKILL else {128 + number}
        others = {1} if number == SIGKILL else own if phase == "training" else own | {1}
        own = own | {"meeting": {-number}, "start-up": {-number}, "over": {0}}.get(phase, set())
        if self.saved() >= STEPS - self.saves:
            others = others | {0, 1}
        others = others | {None}  # a process that hangs is counted apart
        expected = [own if rank in hit else others for rank in range(len(statuses))]
        return [rank for rank, status in enumerate(statuses) if status not in expected[rank]]
