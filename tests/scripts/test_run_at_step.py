"""RUN, RUN@STEP and a run that was stopped name weights, and every script takes them alike."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file

from tests.shared.local_hub import serving
from tests.shared.processes import call
from tests.shared.runs import config_maker
from trainers.config.loading import dump_config
from trainers.dreambooth import DreamBooth
from trainers.errors import Interrupted, UserError
from trainers.metrics import feature_networks
from trainers.run import run
from trainers.run_folder import WEIGHT_NAME
from trainers.training.manifest import manifest_checksum
from trainers.training.run_weights import find_run_weights, split_step

OPTIONS = ("validation.prompts=[a b c]", "validation.validation_steps=1", "train.ema_decay=0.5")


@pytest.fixture(scope="module")
def stopped(bases, photos, tmp_path_factory):
    """Config of a run of six steps that a signal stopped after the third; all steps have a LoRA."""
    make = config_maker(bases, photos, tmp_path_factory.mktemp("stopped"))
    config = make(*OPTIONS, "checkpoint.checkpointing_steps=1")
    losses = DreamBooth.losses

    def stop(task, batch, rng):
        if rng.step == 2:
            os.kill(os.getpid(), 15)
        yield from losses(task, batch, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DreamBooth, "losses", stop)
        with pytest.raises(Interrupted):
            run(config)
    return config


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(("suffix", "step"), [("", 3), ("@3", 3), ("@1", 1)])
def test_a_stopped_run_gives_the_pictures_of_its_step(stopped, suffix, step, tmp_path, capsys):
    folder = stopped.output_dir
    argument = f"{folder}{suffix}"
    assert call("generate.py", argument, "--prompt", "a b c", "--out", tmp_path) == 0
    told = capsys.readouterr().out.splitlines()[:-1]
    wanted = [f"{folder} is not finished: this is the LoRA of its newest checkpoint, {folder}@3"]
    assert told == ([] if suffix else wanted)
    own = picture(tmp_path / "00-0.png")
    # the layers of the training round otherwise than those of diffusers
    assert abs(own - picture(folder / f"samples/step-{step:06d}/00-0.png")).max() <= 1
    others = [picture(folder / f"samples/step-{n:06d}/00-0.png") for n in (1, 2, 3) if n != step]
    assert all(abs(own - other).max() > 3 for other in others)


def test_the_lora_of_a_step_is_exported_beside_its_run(stopped, capsys):
    folder = stopped.output_dir
    assert call("export.py", f"{folder}@2", "--format", "kohya") == 0
    assert "differ by at most 0.0e+00" in capsys.readouterr().out
    assert call("export.py", folder, "--format", "diffusers") == 0
    one = load_file(folder / "run@3_diffusers.safetensors")
    other = load_file(folder / "checkpoints/step-000003" / WEIGHT_NAME)
    assert one.keys() == other.keys()
    assert all(one[name].equal(tensor) for name, tensor in other.items())
    assert (folder / "run@2_kohya.safetensors").is_file()


def test_the_lora_of_a_step_is_measured_beside_the_finished_one(stopped, monkeypatch, nets):
    monkeypatch.setattr(feature_networks, "CLIP_NAMES", ())
    folder = stopped.output_dir
    options = ["--dino", nets[0], "--num-images", "1", "--strengths", "1"]
    assert call("evaluate.py", f"{folder}@2", *options, "--checkpoints") == 0
    result = json.loads((folder / "evaluation-step-000002/evaluation.json").read_text())
    names = ["base", "step-000001", "step-000003", "step-000002"]
    assert [row["checkpoint"] for row in result["rows"]] == names
    assert result["rows"][-1]["step"] == 2
    assert result["strength"][0]["subject"] == result["rows"][-1]["subject"]
    assert not (folder / "evaluation.json").exists()


def test_the_lora_of_a_step_is_pushed_with_a_card_of_its_own(stopped, tmp_path, monkeypatch):
    folder = stopped.output_dir
    with serving(tmp_path, monkeypatch) as server:
        assert call("push.py", f"{folder}@2", "--repo", "me/mine") == 0
        pushed = server.repos.keys()
        there = Path(snapshot_download("me/mine"))
    assert pushed == {"me/mine"}
    card = (there / "README.md").read_text()
    assert "2 of 2 x 1 pictures" in card
    assert "Reload proof" not in card
    assert str(tmp_path) not in card
    own = (folder / "checkpoints/step-000002" / WEIGHT_NAME).read_bytes()
    assert (there / WEIGHT_NAME).read_bytes() == own
    sample = (folder / "samples/step-000002/00-0.png").read_bytes()
    assert (there / "samples/final/00-0.png").read_bytes() == sample


@pytest.mark.parametrize("script", ["generate.py", "export.py", "evaluate.py", "push.py"])
def test_a_step_without_a_lora_is_told_with_those_that_have_one(stopped, script, capsys):
    options = ["--prompt", "a"] if script == "generate.py" else []
    assert call(script, f"{stopped.output_dir}@400", *options) == 2
    assert "no LoRA of step 400. There are those of these steps: 1, 2, 3" in capsys.readouterr().err


@pytest.fixture
def plain(settings):
    """A run folder without weights, and a function that gives it a checkpoint's LoRA."""
    config = settings("train.max_train_steps=4")
    folder = config.output_dir
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))

    def add(step, end=""):
        checkpoint = folder / f"checkpoints/step-{step:06d}"
        checkpoint.mkdir(parents=True)
        manifest = {"step": step, "files": {}, "facts": {}, "end": end, "scaler": None}
        manifest["sha256"] = manifest_checksum(manifest)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        (checkpoint / WEIGHT_NAME).touch()

    return folder, add


def finish(folder, seconds):
    """A final LoRA, so many seconds younger than all else."""
    (folder / WEIGHT_NAME).touch()
    time = max(path.stat().st_mtime for path in folder.rglob(WEIGHT_NAME)) + seconds
    os.utime(folder / WEIGHT_NAME, (time, time))


@pytest.mark.parametrize(
    ("step", "end", "seconds", "found"),
    [
        (4, "", -9, None),
        (2, "the loss rises", -9, None),
        # the last checkpoint could not be written
        (2, "", 9, None),
        # it is trained longer, and was stopped
        (2, "", -9, 2),
    ],
)
def test_a_run_is_finished_where_its_file_is_of_its_last_step(plain, step, end, seconds, found):
    folder, add = plain
    add(step, end)
    finish(folder, seconds)
    weights = find_run_weights(folder)
    assert weights.step == found
    assert bool(weights.note) == (found is not None)


def test_names_with_an_at_sign_are_names_first(tmp_path):
    (tmp_path / "rex@4").mkdir()
    assert split_step(tmp_path / "rex@4") == (tmp_path / "rex@4", None)
    assert split_step(tmp_path / "rex@4@2") == (tmp_path / "rex@4", 2)
    assert split_step(tmp_path / "rex@x") == (tmp_path / "rex@x", None)
    assert split_step(f"{tmp_path}/rex/@12") == (tmp_path / "rex", 12)
    checkpoint = tmp_path / "rex/checkpoints/step-000012"
    assert split_step(checkpoint) == (tmp_path / "rex", 12)


def test_a_run_of_all_weights_has_none_of_a_step(settings, tmp_path):
    config = settings("lora=null")
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    with pytest.raises(UserError, match="only the checkpoints of a LoRA run"):
        find_run_weights(f"{config.output_dir}@2")
    shutil.rmtree(config.output_dir)
    with pytest.raises(UserError, match="is no run folder"):
        find_run_weights(f"{config.output_dir}@2")
