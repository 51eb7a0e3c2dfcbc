"""Laws of stopping early: a callback may ask for it, and it counts as the end of the run."""

import json
import signal

import pytest
from safetensors.torch import load, load_file
from torch.testing import assert_close

from trainers import dreambooth
from trainers.errors import Interrupted
from trainers.run import run
from trainers.training import callbacks
from trainers.training.checkpoint import read_checkpoint
from trainers.training.loop import StopReason


@pytest.fixture
def stop_after(monkeypatch):
    """Give every DreamBooth task a callback that asks to stop after a step."""
    original = dreambooth.DreamBooth.__init__

    def install(last_step):
        called = []

        def ask(step, metrics):
            called.append(step)
            if step == last_step:
                return StopReason("the held-out loss rises", step)
            return None

        def init(task, *arguments):
            original(task, *arguments)
            task.callbacks = [*task.callbacks, ask]

        monkeypatch.setattr(dreambooth.DreamBooth, "__init__", init)
        return called

    return install


def test_a_callback_stops_the_run_which_is_then_finished(settings, stop_after, capsys):
    config = settings("checkpoint.checkpointing_steps=4")
    called = stop_after(3)
    run(config)
    assert called == [1, 2, 3]
    assert "the training is over after step 3: the held-out loss rises" in capsys.readouterr().out
    manifest, _ = read_checkpoint(config.output_dir / "checkpoints/step-000003")
    assert manifest["step"] == 3
    assert manifest["end"] == "the held-out loss rises"
    assert (config.output_dir / "pytorch_lora_weights.safetensors").is_file()
    assert "3 of 2 x 1 pictures" in (config.output_dir / "README.md").read_text()


def test_the_stopped_run_has_the_weights_of_a_run_of_so_many_steps(settings, stop_after, tmp_path):
    short = settings("train.max_train_steps=3", f"output_dir={tmp_path}/short")
    run(short)
    stopped = settings(f"output_dir={tmp_path}/stopped")
    stop_after(3)
    run(stopped)
    states = [read_checkpoint(c.output_dir / "checkpoints/step-000003") for c in (short, stopped)]
    weights = [files["denoiser.safetensors"] for _, files in states]
    assert weights[0] == weights[1]


def test_a_resumed_run_that_was_over_does_not_train_on(settings, stop_after):
    config = settings()
    called = stop_after(3)
    run(config)
    file = config.output_dir / "pytorch_lora_weights.safetensors"
    weights = load(file.read_bytes())
    file.unlink()
    run(config)
    assert called == [1, 2, 3]
    assert_close(load_file(file), weights, rtol=0, atol=0)


def test_all_callbacks_see_the_step_after_which_one_asks_to_stop(settings, stop_after):
    config = settings("tracking.log_every=1")
    stop_after(3)
    run(config)
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_signal_at_the_step_after_which_a_callback_stops_is_not_lost(
    settings, stop_after, monkeypatch
):
    save = callbacks.save_checkpoint

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(callbacks, "save_checkpoint", signalled)
    stop_after(3)
    config = settings("checkpoint.checkpointing_steps=4")
    with pytest.raises(Interrupted, match="the same command goes on from the checkpoint"):
        run(config)
    assert not (config.output_dir / "pytorch_lora_weights.safetensors").exists()
    manifest, _ = read_checkpoint(config.output_dir / "checkpoints/step-000003")
    assert manifest["end"] == "the held-out loss rises"
