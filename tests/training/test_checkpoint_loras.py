"""Each checkpoint has the LoRA of its step, which stays longer than the state to resume."""

import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from tests.shared.runs import lora
from trainers.config import DreamBoothConfig
from trainers.config.base_sections import CheckpointConfig
from trainers.dreambooth import DreamBooth
from trainers.errors import Interrupted, UserError
from trainers.families import FAMILIES
from trainers.lora.sampler import export_checkpoints
from trainers.run import run
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME, list_checkpoints
from trainers.training import checkpoint_folders
from trainers.training.checkpoint import resume, save_checkpoint
from trainers.training.facts import resume_facts
from trainers.training.loop import Player
from trainers.training.run_state import RunState


class Killed(BaseException):
    pass


@pytest.fixture
def bare(tmp_path):
    """A run without a trainer, whose LoRA is a number: `save(steps, **checkpoint settings)`."""
    accelerator, net = Accelerator(cpu=True), nn.Linear(2, 2)
    player = Player(net, torch.optim.AdamW(net.parameters()))
    facts = resume_facts(DreamBoothConfig(), accelerator, {})
    root = tmp_path / "run/checkpoints"

    def configure(**settings):
        limits = CheckpointConfig(**{"checkpoints_total_limit": 1, **settings})
        return DreamBoothConfig(output_dir=tmp_path / "run", checkpoint=limits)

    def save(*steps, **settings):
        for step in steps:
            weights = {"step": torch.tensor(step)}
            task = SimpleNamespace(
                players={"net": player},
                save=lambda folder, weights=weights: save_file(weights, folder / WEIGHT_NAME),
            )
            save_checkpoint(configure(**settings), task, accelerator, RunState(facts, step))

    def go_on(**settings):
        task = SimpleNamespace(players={"net": player})
        return resume(configure(**settings), task, accelerator, facts).step

    def steps():
        return [step for step in range(99) if (root / f"step-{step:06d}" / WEIGHT_NAME).is_file()]

    return SimpleNamespace(root=root, save=save, resume=go_on, steps=steps)


@pytest.mark.parametrize(
    ("limit", "keep", "kept"),
    [(1, 3, [4, 6, 8]), (1, 1, [8]), (1, 0, [8]), (3, 1, [4, 6, 8]), (1, None, [2, 4, 6, 8])],
)
def test_loras_stay_longer_than_states(bare, limit, keep, kept):
    bare.save(2, 4, 6, 8, checkpoints_total_limit=limit, keep_loras=keep)
    assert bare.steps() == kept
    assert sorted(path.name for path in bare.root.iterdir()) == [f"step-{n:06d}" for n in kept]
    states = [path.name for path in list_checkpoints(bare.root)]
    assert states == [f"step-{n:06d}" for n in (8, 6, 4, 2)][:limit]
    for step in kept[:-limit]:
        assert [path.name for path in (bare.root / f"step-{step:06d}").iterdir()] == [WEIGHT_NAME]


def test_what_has_a_lora_alone_is_no_checkpoint_and_no_damage(bare, recwarn):
    bare.save(2, 4)
    shutil.copytree(bare.root / "step-000002", bare.root / "step-000009")
    assert bare.resume() == 4
    assert not recwarn.list
    # it is of another way from here, as a checkpoint of a later step is
    assert bare.steps() == [2, 4]
    assert (bare.root / "left-000009" / WEIGHT_NAME).is_file()


def test_without_states_a_run_starts_anew_and_writes_checkpoints(bare):
    bare.save(2, 4)
    shutil.rmtree(bare.root / "step-000004")
    with pytest.raises(UserError, match="holds a run already"):
        bare.resume(resume_from_checkpoint=None)
    assert bare.resume() == 0
    bare.save(2)
    assert [path.name for path in list_checkpoints(bare.root)] == ["step-000002"]
    assert (bare.root / "left-000002" / WEIGHT_NAME).is_file()


def test_files_of_the_users_beside_a_lora_stay(bare):
    bare.save(2, 4)
    (bare.root / "step-000002" / "notes.txt").write_text("the best")
    bare.save(6, keep_loras=0)
    assert bare.steps() == [6]
    assert (bare.root / "step-000002" / "notes.txt").read_text() == "the best"


def test_a_kill_while_a_state_is_removed_leaves_its_lora(bare, monkeypatch):
    def kill(folder, keep_lora):
        next(folder.glob("*.optimizer.pt")).unlink()
        raise Killed

    bare.save(2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folders, "empty_trash", kill)
        with pytest.raises(Killed):
            bare.save(4)
    assert bare.resume() == 4
    bare.save(6)
    assert bare.steps() == [2, 4, 6]
    assert not list(bare.root.glob(".*"))


def test_a_lora_that_cannot_be_written_costs_its_checkpoint_and_a_warning(settings, monkeypatch):
    def fail(task, folder):
        (folder / WEIGHT_NAME).write_bytes(b"half")
        raise OSError("No space left on device")

    config = settings("train.max_train_steps=2", "checkpoint.checkpointing_steps=1")
    monkeypatch.setattr(DreamBooth, "save", fail)
    monkeypatch.setattr(DreamBooth, "finish", lambda task, steps: None)
    with pytest.warns(UserWarning, match="writing .*step-000002 failed .*No space left"):
        run(config)
    assert list((config.output_dir / "checkpoints").iterdir()) == []


def test_a_checkpoint_has_the_averaged_lora_in_each_format_of_the_run(settings, bases, tmp_path):
    options = ["train.ema_decay=0.9", "lora.kohya=true", "train.max_train_steps=4"]
    config = settings(*options, "checkpoint.checkpoints_total_limit=1")
    run(config)
    short = settings(*options[:2], "train.max_train_steps=2", f"output_dir={tmp_path}/short")
    run(short)
    root = config.output_dir / "checkpoints"
    for folder, wanted in ((root / "step-000002", short), (root / "step-000004", config)):
        for name in (WEIGHT_NAME, KOHYA_NAME):
            found, expected = load_file(folder / name), load_file(wanted.output_dir / name)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    family = FAMILIES["sd15"](config.model)
    family.load("unet", "text_encoder")
    family.pipe.load_lora_weights(root / "step-000002", weight_name=WEIGHT_NAME)
    folders = export_checkpoints(config, config.output_dir, family, (), tmp_path / "exported")
    assert folders == {path.name: path for path in (root / "step-000002", root / "step-000004")}


def test_a_stopped_run_has_the_lora_of_its_last_step(settings, monkeypatch):
    losses = DreamBooth.losses

    def stop(task, batch, rng):
        if rng.step == 2:
            signal.raise_signal(signal.SIGINT)
        yield from losses(task, batch, rng)

    config = settings("checkpoint.checkpointing_steps=100")
    monkeypatch.setattr(DreamBooth, "losses", stop)
    with pytest.raises(Interrupted):
        run(config)
    stopped = load_file(config.output_dir / "checkpoints/step-000003" / WEIGHT_NAME)
    monkeypatch.undo()
    short = settings("train.max_train_steps=3", f"output_dir={config.output_dir}-short")
    run(short)
    assert all(torch.equal(stopped[name], tensor) for name, tensor in lora(short).items())
