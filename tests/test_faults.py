"""Faults in one process - a full disk, damaged files, trackers, NaN, taken folders, memory - and
what remains."""

import copy
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import nullcontext
from functools import cache
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from processes import call, start
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from trainers import dreambooth
from trainers.autoencoder import Autoencoder
from trainers.config import OptimizerConfig, loading
from trainers.data.encoder_cache import CachedEncoder, TensorCache
from trainers.data.sampler import BatchSlice
from trainers.distributed.trained_weights import trainable_parameters
from trainers.dreambooth import DreamBooth
from trainers.errors import RunFailedError, UserError
from trainers.families.trainable import TrainableDenoiser
from trainers.from_scratch.networks import ConvAutoencoder
from trainers.from_scratch.task import FromScratchTask
from trainers.gan import Gan
from trainers.run import resume, run
from trainers.training import callbacks
from trainers.training.checkpoint import read_checkpoint
from trainers.training.optimizers import clip_and_step, make_optimizer

PAGE = os.sysconf("SC_PAGE_SIZE")  # a tmpfs takes and gives whole ones
FINISH = DreamBooth.finish


@pytest.fixture(scope="module")
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
        monkeypatch.setattr(task, "finish", lambda task: None)


@pytest.fixture(scope="module")
def finished(make):
    """A function: overrides -> settings of a run that nothing disturbed."""

    @cache
    def make_finished(*overrides):
        settings = make(*overrides)
        run(settings)
        return settings

    return make_finished


@pytest.fixture
def disturb(monkeypatch):
    """A function: what to do before step n (from 0), once; in which steps a player's loss is NaN;
    the trainer."""

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
    rows = [
        json.loads(line)
        for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return {row["step"]: row[name] for row in rows if name in row}


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


@pytest.mark.parametrize("pages", [0, 3, 12])
def test_a_checkpoint_that_finds_the_disk_full_is_told_and_training_goes_on(
    make, finished, disk, disturb, warning_text, pages
):
    """The pages end before the first file of the checkpoint, within it, and within the next one."""
    settings, left = make(f"output_dir={disk}/run", "tracking.report_to=[tensorboard]"), []

    def look(task):
        left.extend(names(settings))
        assert read_checkpoint(checkpoint(settings, 2))
        (disk / "ballast").unlink()

    disturb({3: lambda task: fill(disk, pages), 4: look})
    run(settings)
    assert re.search(
        r"writing .*/run/checkpoints/step-000004 failed \(.*No space left.*; training goes on",
        warning_text(),
    )
    assert left == ["step-000002"]
    assert metrics(settings) == metrics(finished())
    assert_same(settings, finished())


@pytest.mark.parametrize("first", [3, 2])
def test_a_half_written_line_of_metrics_stops_neither_the_run_nor_the_next(
    make, finished, disk, disturb, warning_text, first
):
    """The file begins with a line that leaves a hundred bytes in its page; `first` is the first
    step after that."""
    settings = make(f"output_dir={disk}/run")
    settings.output_dir.mkdir()
    row = json.dumps({"step": 0, "images_per_second": 1, "peak_memory_gib": 1, "pad": "?"})
    (settings.output_dir / "metrics.jsonl").write_text(
        row.replace("?", "x" * (PAGE - 100 - len(row))) + "\n"
    )
    disturb({0: lambda task: fill(disk), 1: lambda task: (disk / "ballast").unlink()})
    run(until(settings, 4))
    assert re.search(
        r"writing .*/run/metrics.jsonl failed \(.*No space left.*; training goes on", warning_text()
    )
    with open(settings.output_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "denoiser_lo')
    run(settings)
    assert {
        step: loss for step, loss in metrics(finished()).items() if step >= first
    }.items() <= metrics(settings).items()
    assert_same(settings, finished())


@pytest.mark.parametrize("at", ["cache", "export"])
def test_a_disk_that_is_full_for_good_is_one_message(
    make, finished, disk, disturb, capsys, monkeypatch, tmp_path, at
):
    """And once there is room, the same command goes on from the last checkpoint, if any."""
    monkeypatch.setattr(DreamBooth, "finish", FINISH)
    settings = make(f"output_dir={disk}/run", *(["data.cache_dir=null"] if at == "cache" else []))
    (tmp_path / "config.yaml").write_text(loading.dump_config(settings))
    if at == "cache":
        fill(disk, 4)
        remains, left = (
            "There is no checkpoint yet: the same command begins anew",
            {".lock", ".owner", "cache"},
        )
    else:
        disturb({3: lambda task: fill(disk)})
        remains = "The checkpoint step-000002 is intact: the same command goes on from it"
        left = {".lock", ".owner", "config.yaml", "metrics.jsonl", "checkpoints"}
    assert call("train.py", tmp_path / "config.yaml") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"^the disk is full \(.*No space left.*\)\. Free some space\. " + remains, message
    )
    assert {path.name for path in settings.output_dir.iterdir()} == left
    (disk / "ballast").unlink()
    assert call("train.py", tmp_path / "config.yaml") == 0
    assert (settings.output_dir / "pytorch_lora_weights.safetensors").exists()
    assert_same(settings, finished())


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [
        *(
            (TensorBoardTracker, name, "the tracker")
            for name in ("__init__", "start", "log", "log_images", "finish")
        ),
        (dreambooth, "write_samples", "sampling"),
    ],
)
def test_a_tracker_or_samples_that_fail_cost_a_warning_and_nothing_else(
    make, finished, warning_text, monkeypatch, owner, name, what
):
    shared = ("lora.dropout=0.3", "validation.prompts=[a]", "validation.validation_steps=2")
    settings, whole = make(*shared, "tracking.report_to=[tensorboard]"), finished(*shared)
    monkeypatch.setattr(owner, name, lambda *_, **__: socket.create_connection(("127.0.0.1", 0)))
    run(settings)
    assert re.search(
        rf"^{what} failed \(\w*Error: .*\); training goes on$", warning_text(), re.MULTILINE
    )
    assert metrics(settings) == metrics(whole)
    assert_same(settings, whole)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("name", ["denoiser.safetensors", "denoiser.optimizer.pt", "manifest.json"])
def test_a_checkpoint_damaged_anywhere_is_known_and_the_one_before_it_taken(
    make, finished, warning_text, name, cut
):
    """Cut off at a tenth of the offsets, or with a bit flipped there."""
    settings, r = make(), random.Random(0)
    shutil.copytree(finished().output_dir, settings.output_dir)
    newest = checkpoint(settings, 6)
    content, whole = (newest / name).read_bytes(), read_checkpoint(newest)
    with open(newest / name, "rb+", buffering=0) as file:
        for offset in sorted(r.sample(range(len(content)), len(content) // 10), reverse=True):
            os.pwrite(file.fileno(), flipped(content, offset)[offset : offset + 1], offset)
            if cut:
                file.truncate(offset)
            assert read_checkpoint(newest) in (None, whole), content[
                max(0, offset - 20) : offset + 20
            ]  # 1e-8 is 1E-8
            if not cut:
                os.pwrite(file.fileno(), content[offset : offset + 1], offset)
        file.truncate(9)
    run(settings)
    assert f"{newest} is damaged and is passed over" in warning_text()
    assert_same(settings, finished())
    for step in (2, 4, 6):
        os.truncate(checkpoint(settings, step) / name, step)
    with pytest.raises(
        UserError, match=r"none of the 3 checkpoints in .* is complete: choose another output_dir"
    ):
        run(settings)
    assert names(settings) == ["left-000006", "step-000002", "step-000004", "step-000006"]


def test_a_cache_entry_with_a_flipped_bit_anywhere_is_known_and_encoded_again(
    make, finished, tmp_path, warning_text
):
    shutil.copytree(finished("data.cache_dir=null").output_dir / "cache", tmp_path / "cache")
    contents = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    path, entries = max(contents), TensorCache(tmp_path / "cache")
    for offset in range(len(contents[path])):
        path.write_bytes(flipped(contents[path], offset))
        assert entries.read_file(path.stem) is None, offset
    for path, content in contents.items():
        path.write_bytes(flipped(content, len(content) - 9))
    settings = make(f"data.cache_dir={tmp_path}/cache")
    run(settings)
    assert "cache" not in warning_text()
    assert {path: path.read_bytes() for path in contents} == contents
    assert_same(settings, finished())


def test_a_cache_entry_that_is_damaged_while_the_run_goes_on_is_one_message(
    make, photos, tmp_path, monkeypatch
):
    plain = CachedEncoder.fill

    def damage(self, crops, prompts, accelerator):
        plain(self, crops := list(crops), prompts, accelerator)
        os.truncate(self.cache.path(self.image_key(*crops[0])), 99)

    monkeypatch.setattr(CachedEncoder, "fill", damage)
    with pytest.raises(
        RunFailedError,
        match=rf"The cached encoding of {photos}/0.png .* damaged .*: start the run again",
    ):
        run(make(f"data.cache_dir={tmp_path}/cache"))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_clipped_step_is_torch_s_and_one_without_a_finite_gradient_changes_nothing(name):
    accelerator, settings, pairs = (
        Accelerator(cpu=True),
        OptimizerConfig(name=name, weight_decay=0.1),
        [],
    )
    for _ in range(2):
        ws = [torch.nn.Parameter(torch.linspace(-1, 1, n).reshape(-1, 8)) for n in (512, 64, 2**16)]
        pairs.append(
            (
                ws,
                make_optimizer(
                    settings, [{"params": [*ws, torch.nn.Parameter(torch.ones(3))], "lr": 0.1}]
                ),
            )
        )
    (ours, held), (theirs, plain) = pairs
    for factor in (1.0, torch.nan, 1e-4, torch.inf, torch.nan, 0.0, 30.0):
        for w, v in zip(ours, theirs, strict=True):
            w.grad, v.grad = factor * w.detach() * 2, factor * v.detach() * 2
        before = copy.deepcopy([ours, held.state_dict()["state"]])
        norm, skipped = clip_and_step(held, torch.zeros(()), 1.0, accelerator)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0, equal_nan=True)
        assert skipped == (not expected.isfinite())
        assert not any(w.grad is not None for w in ours)
        if expected.isfinite():
            plain.step()
        after = tree_leaves([ours, held.state_dict()["state"]])
        if skipped:
            for a, b in zip(after, tree_leaves(before), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        elif name == "adamw":  # eight bits round
            for a, b in zip(after, tree_leaves([theirs, plain.state_dict()["state"]]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def seen(photos, step):
    """The pictures of a step (from 0), by the walk through the folder."""
    return [
        str(photos / f"{BatchSlice(0, 2).sample_index(step, row, 5, 0)}.png") for row in range(2)
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_a_step_without_a_finite_loss_is_skipped_to_the_bit(
    make, photos, disturb, warning_text, optimizer
):
    settings = make(f"optimizer.name={optimizer}", "checkpoint.checkpointing_steps=1")
    disturb(nan=lambda step, player: step == 2)
    run(settings)
    wanted = (
        "step 3 was skipped, for its gradient is not finite (1 so far): loss of denoiser is "
        "not finite, of "
    )
    assert wanted + ", ".join(seen(photos, 2)) in warning_text().splitlines()
    changed = [
        bool(differing(checkpoint(settings, n), checkpoint(settings, n + 1))) for n in range(1, 6)
    ]
    assert changed == [True, False, True, True, True]
    assert metrics(settings, "skipped") == {3: 1}
    assert metrics(settings).keys() == {1, 2, 4, 5, 6}
    assert metrics(settings, "learning_rate").keys() == {1, 2, 3, 4, 5, 6}


def test_the_logged_loss_is_the_mean_of_the_steps_that_were_not_skipped(make, finished, disturb):
    settings = make("tracking.log_every=3")
    disturb(nan=lambda step, player: step == 2)
    run(settings)
    assert metrics(settings, "skipped") == {3: pytest.approx(1 / 3)}
    assert metrics(settings)[3] == pytest.approx(
        (metrics(finished())[1] + metrics(finished())[2]) / 2, rel=1e-6
    )


@pytest.mark.parametrize(
    "bad", ["autoencoder", "discriminator", "generator", "generator discriminator"]
)
def test_only_the_player_without_a_finite_loss_is_held(make, disturb, warning_text, bad):
    kind, bad = "autoencoder" if bad == "autoencoder" else "gan", set(bad.split())
    settings = make("checkpoint.checkpointing_steps=1", "train.train_batch_size=4", kind=kind)
    disturb(
        nan=lambda step, player: step == 2 and player in bad,
        task=Autoencoder if kind == "autoencoder" else Gan,
    )
    run(settings)
    assert re.search(
        rf"step 3 was skipped, .*: loss of ({'|'.join(bad)}) is not finite", warning_text()
    )
    changed = differing(checkpoint(settings, 2), checkpoint(settings, 3))
    players = {"autoencoder"} if kind == "autoencoder" else {"generator", "discriminator"}
    assert {name.split(".")[0] for name in changed} == players - bad
    assert metrics(settings, "skipped") == {3: 1}


def test_a_picture_that_is_not_finite_is_named_and_no_other(
    make, photos, warning_text, monkeypatch
):
    plain, settings, bad = CachedEncoder.moments, make(), f"{photos}/3.png"

    def spoilt(self, picture, crop):
        return plain(self, picture, crop) * (torch.nan if picture.name == bad else 1)

    monkeypatch.setattr(CachedEncoder, "moments", spoilt)
    run(settings)
    steps = [step + 1 for step in range(6) if bad in seen(photos, step)]
    assert list(metrics(settings, "skipped")) == steps
    assert (
        len(steps)
        == len(re.findall(rf": moments is not finite, of {bad}$", warning_text(), re.MULTILINE))
        > 1
    )


@pytest.fixture
def back(monkeypatch):
    """A list of where the run had to go back to, or before."""
    generated = []

    def noting(*arguments, before_step=None):
        generated.extend([] if before_step is None else [before_step])
        return resume(*arguments, before_step=before_step)

    monkeypatch.setattr("trainers.run.resume", noting)
    return generated


LONG = ("train.max_train_steps=12", "train.max_skipped_steps=3")


@pytest.mark.parametrize(
    ("stop", "times"),
    [
        *((None, 1), (9, 1), (None, 2)),
        (6, 1),
    ],
)
def test_a_run_that_diverges_goes_back_and_on_at_half_the_rate(
    make, finished, photos, disturb, back, warning_text, monkeypatch, stop, times
):
    """Also when it is killed in step `stop`. Step 8's checkpoint is left behind: its weights led to
    the bad steps."""
    settings, stops = make(*LONG), [stop]

    def nan(step, player):
        if back and step in stops:
            stops.clear()
            raise KeyboardInterrupt
        return step >= 8 and len(back) < times

    disturb(nan=nan)
    with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        run(settings)
    run(settings)
    assert back == [8] * times
    pictures = ", ".join(seen(photos, 10))
    assert (
        f"the last of them step 11: loss of denoiser is not finite, of {pictures}. Back to step "
        f"6, at half the lear" in warning_text()
    )
    generated = [f"step-{step:06d}" for step in (2, 4, 6, 8, 10, 12)]
    assert names(settings) == ["diverged-000008", "diverged-000010", *generated]
    assert metrics(settings, "learning_rate") == {
        n: 1e-2 if n < 7 else 1e-2 / 2**times for n in range(1, 13)
    }
    assert not metrics(settings, "skipped")
    monkeypatch.setattr(
        "trainers.run.make_lr_schedule", lambda *_: lambda step: 1 if step < 6 else 0.5**times
    )
    assert_same(settings, finished(*LONG, f"tracking.project_name=halved{times}"), 12)


def test_checkpoints_of_skipped_steps_do_not_push_out_the_last_good_one(
    make, disturb, back, warning_text
):
    settings = make(
        *LONG, "checkpoint.checkpointing_steps=1", "checkpoint.checkpoints_total_limit=2"
    )
    disturb(nan=lambda step, player: step >= 8 and not back)
    run(settings)
    assert "Back to step 7" in warning_text()


def test_a_run_that_cannot_or_may_not_go_back_stops_with_a_message(make, photos, disturb, back):
    lost, stopped = make(*LONG), make(*LONG, "train.on_divergence=stop")
    disturb(nan=lambda step, player: step >= (8 if back else 0))
    with pytest.raises(
        RunFailedError,
        match=r"^3 steps in .* step 3: .*There is no checkpoint from before that to go",
    ):
        run(lost)
    assert names(lost) == ["diverged-000002"]
    pictures = ", ".join(map(re.escape, seen(photos, 10)))
    wanted = (
        rf"^3 steps in a row .* step 11: .*, of {pictures}\. Lower "
        rf"optimizer.learning_rate.* another output_dir$"
    )
    with pytest.raises(RunFailedError, match=wanted) as error:
        run(stopped)
    assert (error.value.status, back) == (1, [0])
    assert read_checkpoint(checkpoint(stopped, 8))
    state(checkpoint(stopped, 10))


@pytest.mark.parametrize("rank", [3, 2])
def test_a_weight_that_is_not_finite_is_named_and_taken_from_the_checkpoint(
    make, photos, disturb, warning_text, rank
):
    """None of the pictures is at fault, also where there are as many as the weight has rows."""
    settings = make(*LONG, f"lora.rank={rank}")
    name = (
        "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
    )

    def ruin(task):
        trainable_parameters(task.module)[name].data[0] = torch.nan

    disturb({7: ruin})
    run(settings)
    pictures = ", ".join(map(re.escape, seen(photos, 9)))
    assert re.search(
        rf": weight {re.escape(name)} is not finite(, of {pictures})?\. Back to step 6",
        warning_text(),
    )
    state(checkpoint(settings, 12))


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
    assert log.read_text().endswith(
        "stopped by signal 10; the same command goes on from the checkpoint\n"
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


def limit(monkeypatch, rows, model=TrainableDenoiser):
    """More rows than these are out of memory."""
    plain = model.forward

    def forward(self, x, *inputs):
        if len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return plain(self, x, *inputs)

    monkeypatch.setattr(model, "forward", forward)


FOUR, AUTO = "train.train_batch_size=4", "train.auto_micro_batch=true"


@pytest.mark.parametrize("auto", [False, True])
def test_out_of_memory_lists_what_helps_the_cheapest_first(make, monkeypatch, auto):
    limit(monkeypatch, 0)
    with pytest.raises(
        RunFailedError, match=r"(?s)^out of memory \(CUDA .*There is no checkpoint yet"
    ) as message:
        run(make(FOUR, f"train.auto_micro_batch={auto}", "data.resolution=80"))
    remedies = [
        line.split(":")[0].strip()
        for line in str(message.value).splitlines()
        if line.startswith("  ")
    ]
    wanted = [AUTO, *(f"train.gradient_checkpointing={kind}" for kind in ("selective", "true"))]
    wanted.append("--config_file accelerate_configs/fsdp2.yaml")
    assert remedies == [*wanted[auto:], "model.quantization=nf4", "data.resolution=48"]
    assert message.value.status == 1


@pytest.mark.parametrize(
    ("kind", "batch", "rows", "parts"),
    [
        ("dreambooth", 4, 3, "2, 2"),
        *(
            ("dreambooth", 4, 1, "1, 4"),
            ("dreambooth", 3, 2, "1, 3"),
            ("autoencoder", 4, 2, "2, 2"),
        ),
        ("dreambooth", 2, 2, "2, 1"),
    ],
)
def test_smaller_parts_that_fit_train_as_the_whole_batch(
    make, monkeypatch, capsys, kind, batch, rows, parts
):
    """Also when it is resumed; the rehearsal of a batch that fits leaves all as it was."""
    loss = "denoiser_loss" if kind == "dreambooth" else "autoencoder_loss"
    shared = (f"train.train_batch_size={batch}", "train.ema_decay=0.9", "optimizer.eps=1e-3")
    whole, settings = make(*shared, kind=kind), make(*shared, AUTO, kind=kind)
    run(whole)
    limit(monkeypatch, rows, TrainableDenoiser if kind == "dreambooth" else ConvAutoencoder)
    run(until(settings, 3))
    run(settings)
    assert capsys.readouterr().out.count(f"micro-batches of {parts} for each step") == 2
    ours, theirs = (
        state(checkpoint(each, 6)) | {"loss": torch.tensor(list(metrics(each, loss).values()))}
        for each in (settings, whole)
    )
    exact = {"rtol": 0, "atol": 0} if rows == batch else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **exact)


def test_players_that_take_turns_cannot_train_on_a_batch_in_parts(make):
    with pytest.raises(
        UserError,
        match=r"train.auto_micro_batch: must be false: the discriminator "
        "has to take its optimizer step",
    ):
        make(AUTO, kind="gan")


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
