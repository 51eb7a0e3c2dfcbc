"""Short runs to disturb: what happens at which step, a small disk, and what remains."""

import os
import signal
import subprocess
from functools import cache
from itertools import count

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from tests.shared.runs import read_metrics
from trainers.config import loading
from trainers.data.sampler import BatchSlice
from trainers.dreambooth import DreamBooth
from trainers.from_scratch.task import FromScratchTask
from trainers.gan import Gan
from trainers.run import run

PAGE = os.sysconf("SC_PAGE_SIZE")  # a tmpfs takes and gives whole ones
FINISH = DreamBooth.finish


@pytest.fixture(scope="session")
def make(bases, photos, bars, tmp_path_factory):
    """A function: overrides, kind -> Config of a six-step run in a new folder, with a checkpoint
    every second step."""
    root, number = tmp_path_factory.mktemp("runs"), count()
    shared = (
        "train: {max_train_steps: 6, train_batch_size: 2}\ntracking: {report_to: [], "
        "log_every: 1}\n"
    )
    shared += "checkpoint: {checkpointing_steps: 2, checkpoints_total_limit: 20}\n"
    small = (
        f"model: {{latent_dim: 4, width: 8}}\ndata: "
        f"{{dataset_name: {bars}, test_split: null, resolution: 28}}\n"
    )
    sources = {"autoencoder": f"kind: autoencoder\n{small}", "gan": f"kind: gan\n{small}"}
    sources["dreambooth"] = f"""
model: {{family: sd15, pretrained_model_name_or_path: {bases["sd15"]}}}
lora: {{rank: 3}}
data: {{instance_data_dir: {photos}, instance_prompt: a b c, resolution: 16,
  cache_dir: {root}/cache}}
optimizer: {{learning_rate: 1e-2}}
validation: {{num_inference_steps: 2, guidance_scale: 2}}
"""

    def settings(*overrides, kind="dreambooth"):
        AcceleratorState._reset_state(reset_partial_state=True)
        (root / "config.yaml").write_text(shared + sources[kind])
        return loading.load_config(
            root / "config.yaml", [f"output_dir={root}/{next(number)}", *overrides]
        )

    return settings


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Runs end with their last checkpoint, which is what is compared, and leave the signals
    alone."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for task in (DreamBooth, FromScratchTask, Gan):
        monkeypatch.setattr(task, "finish", lambda task, steps: None)


@pytest.fixture(scope="session")
def finished(make):
    """A function: overrides -> settings of a run that nothing disturbed."""

    @cache
    def make_finished(*overrides):
        settings = make(*overrides)
        run(settings)
        return settings

    return make_finished


@pytest.fixture
def disturb(monkeypatch, finished):
    """A function: what to do before step n (from 0), once; in which steps a player's loss is NaN;
    the trainer."""
    # afterwards the run that nothing disturbs would be disturbed too
    finished()

    def wrap(events=None, nan=lambda step, player: False, task=DreamBooth):
        plain, events = task.losses, events or {}

        def losses(self, batch, rng):
            events.pop(rng.step, lambda task: None)(self)
            for player, loss in plain(self, batch, rng):
                yield player, loss * torch.nan if nan(rng.step, player) else loss

        monkeypatch.setattr(task, "losses", losses)

    return wrap


@pytest.fixture
def warning_text(recwarn):
    """A function that gives all warnings so far, one a line."""
    return lambda: "\n".join(str(warning.message) for warning in recwarn)


def checkpoint(settings, step):
    return settings.output_dir / "checkpoints" / f"step-{step:06d}"


def names(settings):
    return sorted(path.name for path in (settings.output_dir / "checkpoints").iterdir())


def state(folder):
    """Every weight and average of a checkpoint, and all that its optimisers remember; each is
    finite."""
    tensors = {
        f"{path.name} {k}": v
        for path in folder.glob("*.safetensors")
        for k, v in load_file(path).items()
    }
    for path in folder.glob("*.pt"):
        memory = tree_leaves(torch.load(path, weights_only=True)["state"])
        tensors |= {f"{path.name} {i}": torch.as_tensor(value) for i, value in enumerate(memory)}
    assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())  # noqa: PT018
    return tensors


def differing(one, other):
    """Names of what is not equal to the bit in two checkpoints."""
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def assert_same(settings, other, step=6):
    assert not differing(checkpoint(settings, step), checkpoint(other, step))


def metrics(settings, name="denoiser_loss"):
    """By step, where a line of metrics.jsonl has it."""
    return {row["step"]: row[name] for row in read_metrics(settings) if name in row}


def until(settings, steps):
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"max_train_steps": steps})}
    )


def flipped(content, offset):
    return content[:offset] + bytes([content[offset] ^ 1 << offset % 7]) + content[offset + 1 :]


@pytest.fixture
def disk(tmp_path):
    """The folder of a file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk, pages=0):
    """Leave so many of the file system's pages."""
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, PAGE * (os.statvfs(disk).f_bavail - pages))


def seen(photos, step):
    """The pictures of a step (from 0), by the walk through the folder."""
    return [
        str(photos / f"{BatchSlice(0, 2).sample_index(step, row, 5, 0)}.png") for row in range(2)
    ]
