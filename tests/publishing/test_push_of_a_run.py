"""A run pushes its end and, while it trains, the weights of its steps."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load

from tests.shared.processes import ROOT, call
from tests.shared.pushed_runs import clone, same
from tests.shared.runs import lora
from trainers.config.loading import dump_config
from trainers.publishing import hub as publishing_hub
from trainers.run import run


@pytest.mark.parametrize("required", [False, True])
def test_a_failed_push_fails_the_run_only_if_it_is_required(
    hub, settings, tmp_path, capsys, required
):
    config = settings("hub.push_to_hub=true", f"hub.required={required}")
    (tmp_path / "train.yaml").write_text(dump_config(config))
    hub.fail("commit", 500)
    assert call("train.py", tmp_path / "train.yaml") == required
    assert lora(config)
    message = capsys.readouterr()
    (line,) = (line for line in (message.out + message.err).splitlines() if "--repo me/run" in line)
    hub.faults.clear()
    _, *typed = shlex.split(line)
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, *typed], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(load(clone("me/run")["pytorch_lora_weights.safetensors"]), lora(config))


def test_a_pushed_lora_loads_from_the_hub_and_makes_the_runs_own_picture(hub, settings, way):
    config = settings(
        "hub.push_to_hub=true",
        "hub.hub_model_id=me/mine",
        "validation.prompts=[a b c]",
        "lora.alpha=5",
    )
    run(config)
    (code,) = re.findall(r"```python\n(.*?)```", clone()["README.md"].decode(), re.DOTALL)
    scope = {}
    assert "PRETRAINED_MODEL_NAME_OR_PATH" in code, "the path of a local base is not published"
    base = config.model.pretrained_model_name_or_path
    code = code.replace("PRETRAINED_MODEL_NAME_OR_PATH", base)
    exec(code.replace("PATH_OR_REPO", "me/mine"), scope)
    final = Image.open(config.output_dir / "samples/final/00-0.png")
    assert scope["image"].tobytes() == final.tobytes()
    scope["pipe"].unload_lora_weights()
    assert "GET /lfs/" in " ".join(hub.requests)


def test_uploads_while_training_are_the_weights_of_that_step_and_change_nothing(
    hub, settings, tmp_path
):
    def trained(name, *overrides):
        config = settings(f"output_dir={tmp_path}/{name}", *overrides)
        run(config)
        return lora(config)

    pushed = (
        "hub.push_to_hub=true",
        "hub.hub_model_id=me/mine",
        "hub.push_every=2",
        "train.ema_decay=0.5",
    )
    two, six = trained("two", *pushed[-1:], "train.max_train_steps=2"), trained("six", *pushed[-1:])
    assert same(trained("good", *pushed), six)
    *_, first = hub.repos["me/mine"].log()
    assert first == "Weights at step 2"
    assert same(
        load(
            hub.repos["me/mine"].refs["main"][1].files["pytorch_lora_weights.safetensors"].content
        ),
        two,
    )
    assert hub.repos["me/mine"].log()[0] == "Add trained weights"
    assert not (tmp_path / "good/.push").exists()
    hub.fail("commit", 500)
    with pytest.warns(UserWarning, match="the upload at step 2 failed: the Hub answers 500"):
        assert same(trained("bad", *pushed), six)


@pytest.fixture
def uploads(hub, settings):
    """A `PushToHub` every second step of six, of a task that notes which steps it saved."""
    config, saved = (
        settings("hub.push_to_hub=true", "hub.hub_model_id=me/mine", "hub.push_every=2"),
        [],
    )
    config.output_dir.mkdir()
    (config.output_dir / "config.yaml").write_text(dump_config(config))

    def save(folder):
        saved.append(len(saved))
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"\0%d" % len(saved))

    task = SimpleNamespace(players={}, save=save, saved=saved)
    return publishing_hub.PushToHub(task, config, publishing_hub.check_access(config))


def test_no_upload_starts_while_another_lasts(uploads):
    uploads.job = Future()
    uploads(2, {})
    assert not uploads.task.saved
    uploads.job.set_result(None)
    uploads(4, {})
    assert len(uploads.task.saved) == 1
    uploads.job.result()


def test_uploads_come_every_so_many_steps_before_the_last(hub, uploads):
    uploads.folder.mkdir()
    (uploads.folder / "of_a_run_that_was_killed.safetensors").touch()
    for step in range(1, 7):
        uploads(step, {})
        if uploads.job:
            uploads.job.result()
    assert hub.repos["me/mine"].log() == ["Weights at step 4", "Weights at step 2"]
    assert clone().keys() == {"config.yaml", "pytorch_lora_weights.safetensors"}


def test_failing_uploads_warn_once(hub, uploads, recwarn):
    hub.fail("commit", 500)
    for step in (2, 4):
        uploads(step, {})
        uploads.job.result()
    assert [str(warning.message)[:23] for warning in recwarn] == ["the upload at step 2 fa"]
    hub.faults.clear()
    uploads(2, {})
    uploads.job.result()
    assert len(hub.repos["me/mine"].log()) == 1


def test_other_processes_upload_nothing(uploads):
    other = publishing_hub.PushToHub(uploads.task, uploads.config, None)
    other(2, {})
    other.finish()
    assert not uploads.task.saved
