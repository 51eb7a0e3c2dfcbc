"""Stopped runs whose checkpoints and caches are damaged at random, each of them gone on with.

python tests/fuzz_checkpoints.py [--cases 500] [--seed 0] [--only NUMBER]

Each must end with the weights of an undamaged run, to the bit, from the newest intact checkpoint
and with a warning; or be refused in a message where no checkpoint is intact. Exit status 1 for a
traceback, a hang, other weights, or an intact checkpoint that is not used.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.shared import fuzzing
from tests.shared.fuzzing import CONTENT_DAMAGE, Case, copy_folder, replace_path
from tests.shared.tiny_pipelines import make_sd15
from trainers.config import loading
from trainers.dreambooth import DreamBooth
from trainers.errors import UserError
from trainers.run import run
from trainers.run_folder import MANIFEST_NAME, WEIGHT_NAME, step_folders, step_name
from trainers.training.loop import averaged_weights
from trainers.training.manifest import manifest_checksum

SECONDS_PER_CASE = 60
STEPS = 4  # the stopped run has a checkpoint of each but the last
CONFIG = """
output_dir: {root}/whole
model: {{family: sd15, pretrained_model_name_or_path: {root}/base}}
lora: {{rank: 1, target_modules: [to_q]}}
data: {{instance_data_dir: {root}/photos, instance_prompt: a b c, resolution: 16}}
optimizer: {{learning_rate: 1e-2}}
train: {{max_train_steps: 4, train_batch_size: 1, ema_decay: 0.9}}
checkpoint: {{checkpointing_steps: 1, checkpoints_total_limit: 20}}
tracking: {{report_to: [], log_every: 1}}
"""
# of no type, or size, that a manifest has
ODD_VALUES = (None, True, -1, 1.5, 10**30, "", "a", [], [1], {}, {"a": 1}, [[]], "../../x", "3")

Damage = Callable[[Path, random.Random], str]


def save_average(task: DreamBooth, steps: int) -> None:
    """The end of a run without its proof and pictures."""
    with averaged_weights(task):
        task.save(task.config.output_dir)


def go_on(config: Path, output_dir: Path) -> tuple[str, list[str]]:
    """Train until the LoRA is written; what was printed, and the warnings."""
    DreamBooth.finish = save_average
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        run(loading.load_config(config, [f"output_dir={output_dir}"]))
    return printed.getvalue(), [str(warning.message) for warning in caught]


def prepare(root: Path) -> None:
    """root/whole, a finished run; and root/stopped, what a kill before its last step left."""
    torch.set_num_threads(1)
    make_sd15().save_pretrained(root / "base")
    (root / "photos").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"photos/{i}.png")
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root=root))

    def train(folder: Path) -> str:
        go_on(config, root / "whole")
        return "accepted"

    outcome = fuzzing.try_alone(Case("the whole run", train), root, SECONDS_PER_CASE)
    if outcome != "accepted":
        raise AssertionError(outcome)
    copy_folder(root / "whole", root / "stopped")
    shutil.rmtree(root / "stopped/checkpoints" / step_name(STEPS))
    for name in (WEIGHT_NAME, "report.html"):
        (root / "stopped" / name).unlink()


# Damage


def choose_files(run_folder: Path, rng: random.Random) -> list[Path]:
    """One file of the run, or some of the newest checkpoints."""
    files = sorted(path for path in run_folder.rglob("*") if path.is_file())
    of_checkpoints = [path for path in files if "checkpoints" in path.parts]
    newest = [path for path in of_checkpoints if step_name(STEPS - 1) in path.parts]
    pool = rng.choice((files, of_checkpoints, of_checkpoints, newest, newest))
    return rng.sample(pool, rng.choice((1, 1, 1, 2, 3)))


def damage_content(run_folder: Path, rng: random.Random) -> str:
    told = []
    for path in choose_files(run_folder, rng):
        change = rng.choice(CONTENT_DAMAGE)
        path.write_bytes(change(path.read_bytes() or b"x", rng))
        told.append(f"{change.__name__} {path.relative_to(run_folder)}")
    return ", ".join(told)


def replace_files(run_folder: Path, rng: random.Random) -> str:
    told = []
    for path in choose_files(run_folder, rng):
        told.append(f"{path.relative_to(run_folder)} becomes {replace_path(path, rng)}")
    return ", ".join(told)


def exchange_files(run_folder: Path, rng: random.Random) -> str:
    """The contents of two files, of one step or of two, or of two entries of the cache."""
    kind = rng.choice(("checkpoints/*/*", "cache/*/*"))
    paths = sorted(run_folder.glob(kind))
    one = rng.choice(paths)
    same_name = [path for path in paths if path.name == one.name and path != one]
    same_ending = [path for path in paths if path.suffix == one.suffix and path != one]
    other = rng.choice(same_name or same_ending or paths)
    first, second = one.read_bytes(), other.read_bytes()
    other.write_bytes(first)
    if rng.random() < 0.5:
        one.write_bytes(second)
    return f"{one.relative_to(run_folder)} and {other.relative_to(run_folder)} exchanged"


def change_folders(run_folder: Path, rng: random.Random) -> str:
    """Checkpoints that are gone, copied, renamed, linked, emptied, or are no folders."""
    root = run_folder / "checkpoints"
    one, other = rng.sample([root / step_name(step) for step in range(1, STEPS)], 2)
    later = root / rng.choice((step_name(9), step_name(10**6), "step-9" + "9" * 30, "step-3"))
    kind = rng.randrange(8)
    if kind == 0:
        shutil.rmtree(one)
    elif kind == 1:
        copy_folder(one, later)
    elif kind == 2:
        one.rename(later)
    elif kind == 3:
        one.rename(root / "x")
        other.rename(one)
        (root / "x").rename(other)
    elif kind == 4:
        shutil.rmtree(one)
        one.symlink_to(other, target_is_directory=True)
    elif kind == 5:
        shutil.rmtree(one)
        one.write_bytes(b"")
    elif kind == 6:
        later.mkdir()
        (one / "extra.safetensors").write_bytes(b"x")
        (root / ".DS_Store").write_bytes(b"x")
    else:
        shutil.rmtree(one)
        one.mkdir()
    return f"{('gone copied renamed exchanged linked file extra empty').split()[kind]} {one.name}"


def change_manifest(run_folder: Path, rng: random.Random) -> str:
    """Another value anywhere in the manifest; half of the time its checksum is made anew."""
    step = rng.choice((1, 2, 3, 3, 3))
    path = run_folder / "checkpoints" / step_name(step) / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    place = rng.choice([(), ("files",), ("facts",), ("facts", "pictures"), ("facts", "config")])
    table = manifest
    for key in place:
        table = table[key]
    key = rng.choice([*table, "other"])
    value = rng.choice(ODD_VALUES)
    if rng.random() < 0.2:
        table.pop(key, None)
    else:
        table[key] = value
    is_sealed = rng.random() < 0.5
    if is_sealed:
        manifest["sha256"] = manifest_checksum(manifest)
    text = json.dumps(manifest)
    path.write_text(text)
    seal = "sealed" if is_sealed else "unsealed"
    return f"{seal} manifest {step}: {'.'.join((*place, key))}={value!r}"


KINDS: tuple[Damage, ...] = (
    damage_content,
    damage_content,
    damage_content,
    replace_files,
    replace_files,
    exchange_files,
    change_folders,
    change_manifest,
)


# What must come of it


def same_file(one: Path, other: Path) -> bool:
    if not one.is_file():
        return False
    first, second = one.read_bytes(), other.read_bytes()
    if one.name == MANIFEST_NAME and first != second:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(first) == json.loads(second)
    return first == second


def weights(run_folder: Path) -> dict[str, bytes]:
    """The bits of the finished LoRA; its header tells the time too."""
    tensors = load_file(run_folder / WEIGHT_NAME)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def intact_step(run_folder: Path, stopped: Path) -> int | None:
    """The newest step whose checkpoint is as it was."""
    for step in range(STEPS - 1, 0, -1):
        original = stopped / "checkpoints" / step_name(step)
        folder = run_folder / "checkpoints" / step_name(step)
        # a LoRA beside them is for people, and nothing goes on from it
        names = [MANIFEST_NAME, *json.loads((original / MANIFEST_NAME).read_bytes())["files"]]
        if all(same_file(folder / name, original / name) for name in names):
            return step
    return None


def check(root: Path, damage: Damage, seed: str, folder: Path) -> str:
    """Damage a copy of the stopped run and go on with it."""
    output_dir = folder / "run"
    copy_folder(root / "stopped", output_dir)
    told = damage(output_dir, random.Random(seed))
    intact = intact_step(output_dir, root / "stopped")
    checkpoints = output_dir / "checkpoints"
    newest = max(step_folders(checkpoints), default=0)
    is_sealed = told.startswith("sealed")
    try:
        printed, caught = go_on(root / "config.yaml", output_dir)
    except UserError as error:
        is_alone = all("checkpoints/" in part for part in told.split(", "))
        of_checkpoints = is_alone or damage in (change_folders, change_manifest)
        if intact and of_checkpoints and not is_sealed:
            return f"{told}: step {intact} is intact, and it was refused: {error}"
        raise
    except BaseException as error:
        error.add_note(told)
        raise
    if weights(output_dir) != weights(root / "whole"):
        return f"{told}: other weights"
    match = re.search(r"resumed from .*step-0*(\d+):", printed)
    resumed = int(match[1]) if match else None
    if resumed != intact and not is_sealed:
        return f"{told}: went on from {resumed}, and {intact} is the newest intact one"
    is_told = any("passed over" in text for text in caught)
    if intact and newest > intact and not is_told and not is_sealed:
        return f"{told}: no warning"
    return "accepted"


def cases(root: Path, count: int, seed: int) -> Iterator[Case]:
    """Each a function of seed and number, so that one case can be had again."""
    prepare(root)
    for number in range(count):
        damage = KINDS[number % len(KINDS)]
        yield Case(damage.__name__, partial(check, root, damage, f"{seed} {number}"))


if __name__ == "__main__":
    sys.exit(fuzzing.main(__doc__, cases, SECONDS_PER_CASE, 500))
