"""A run that no longer improves ends, with its best weights kept, however it came there."""

import json
import shutil

import pytest

from tests.shared.runs import lora, read_metrics
from tests.shared.scripted_validations import (
    CURVE,
    assert_same_end,
    assert_same_tensors,
    best_step,
    last_step,
)
from trainers.dreambooth import DreamBooth
from trainers.errors import UserError
from trainers.run import run
from trainers.run_folder import BEST, read_best
from trainers.training import callbacks
from trainers.training.manifest import read_manifest

STOP = "train.early_stop.patience=2"


def test_it_ends_after_so_many_validations_without_an_improvement(held_out, script, capsys):
    config = held_out(STOP, "checkpoint.checkpointing_steps=1", "tracking.log_every=5")
    script(CURVE)
    run(config)
    assert (last_step(config), best_step(config)) == (4, 2)
    record = {"step": 2, "metric": "held_out_loss", "value": 3.0}
    assert read_best(config.output_dir / BEST) == record
    printed = capsys.readouterr().out
    assert "over after step 4: held_out_loss was best at step 2, 3: no improvement in 2" in printed
    assert "held out loss 3 at step 2: that was 2 steps before the end" in printed
    # each has a line of its own, although every fifth step is due
    found = {row["step"]: row["held_out_loss"] for row in read_metrics(config)}
    assert found == {1: 5, 2: 3, 3: 4, 4: 3}
    assert "held out loss 3 at step 2" in (config.output_dir / "README.md").read_text()
    manifest = read_manifest(config.output_dir / "checkpoints/step-000004")
    assert manifest["best"] == {"step": 2, "value": 3, "mark": 3, "waited": 2}


@pytest.mark.parametrize("killed", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_run_that_was_killed_ends_after_the_same_step(held_out, script, tmp_path, killed):
    """Checkpoints are of steps 2 and 4: a kill in step 2 comes after a first best without one."""
    whole = held_out(STOP, f"output_dir={tmp_path}/whole")
    script(CURVE)
    run(whole)
    config = held_out(STOP)
    script(CURVE, stop=killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    run(config)
    assert_same_end(config, whole)


def test_the_best_of_a_future_that_did_not_come_is_not_kept(held_out, script):
    """It was the best at step 3, and the run goes on from step 2, and otherwise."""
    config = held_out("checkpoint.checkpointing_steps=2")
    script([4, 3, 1, 1, 1, 1], stop=4)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert best_step(config) == 3
    script([4, 3, 5, 6, 7, 8])
    run(config)
    assert best_step(config) == 2


def test_a_run_killed_before_its_end_was_noted_does_not_train_on(
    held_out, script, monkeypatch, capsys
):
    config = held_out(STOP, "checkpoint.checkpointing_steps=1")
    script(CURVE)
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(callbacks.SaveCheckpoints, "save_end", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    assert last_step(config) == 4
    assert "over after step 4" in capsys.readouterr().out


def test_a_run_that_ended_early_goes_on_where_it_is_extended(held_out, script):
    config = held_out(STOP)
    script(CURVE)
    run(config)
    run(held_out(STOP, "checkpoint.extend=true"))
    assert (last_step(config), best_step(config)) == (6, 6)


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [((), True), (("checkpoint.keep_best=false",), False), (("lora=null",), False)],
)
def test_the_best_is_kept_where_it_is_small(held_out, script, overrides, kept):
    config = held_out("train.max_train_steps=2", *overrides)
    script([1, 2])
    run(config)
    assert best_step(config) == (1 if kept else None)


def test_a_run_that_goes_back_has_the_best_of_its_own_past(held_out, script, monkeypatch):
    """Steps 3 and 4 fail once, which is noticed after step 3 was the best; then it no longer is."""
    curve, failed = [2, 3, 1, 1, 4, 4], []
    config = held_out(
        "train.max_skipped_steps=2", "tracking.log_every=4", "checkpoint.checkpointing_steps=1"
    )
    script(curve)
    losses = DreamBooth.losses

    def diverging(task, batch, rng):
        is_bad = rng.step in (2, 3) and len(failed) < 2
        for player, loss in losses(task, batch, rng):
            yield player, loss * (float("nan") if is_bad else 1)
        if is_bad:
            failed.append(best_step(config))
            curve[3] = 9
            curve[2] = 1 if len(failed) == 1 else 9

    monkeypatch.setattr(DreamBooth, "losses", diverging)
    run(config)
    assert failed == [1, 3]
    assert best_step(config) == 1
    kept = config.output_dir / "checkpoints/step-000006/best"
    assert_same_tensors(kept, config.output_dir / BEST)


def test_a_changed_rule_is_refused_and_a_changed_pace_of_validations(held_out, script):
    script(CURVE)
    run(held_out(STOP))
    with pytest.raises(UserError, match=r"validation_steps: was 1, is 2"):
        run(held_out(STOP, "validation.validation_steps=2"))
    with pytest.raises(UserError, match=r"train\.early_stop: was \{"):
        run(held_out("train.early_stop.patience=3"))


def test_figures_of_other_pictures_are_not_compared(
    held_out, script, other_photos, tmp_path, capsys
):
    """Of the photos that are held out from step 3 on the best is worse than of those before."""
    script([5, 3, 4, 4], stop=4)
    with pytest.raises(KeyboardInterrupt):
        run(held_out("checkpoint.checkpointing_steps=1"))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    shutil.copy(min(path for path in other_photos.iterdir() if path.is_file()), fewer)
    config = held_out("checkpoint.checkpointing_steps=1", f"data.held_out_dir={fewer}")
    script([9, 9, 9, 8, 7, 7])
    run(config)
    assert best_step(config) == 5
    assert "the best so far, 3 at step 2: the best is chosen anew" in capsys.readouterr().out


def test_nothing_but_the_end_depends_on_it(held_out, script, tmp_path):
    script([6, 5, 4, 3, 2, 1])
    plain = held_out(f"output_dir={tmp_path}/plain", "checkpoint.keep_best=false")
    run(plain)
    stopping = held_out(STOP)
    run(stopping)
    assert all(tensor.equal(lora(plain)[name]) for name, tensor in lora(stopping).items())
    assert json.loads((stopping.output_dir / "best/best.json").read_text())["step"] == 6
