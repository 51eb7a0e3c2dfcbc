"""A resumed run equals an undisturbed one, or is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.shared.runs import VARIED_CAPTIONS, lora, losses, run_steps
from trainers import run_folder
from trainers.errors import UserError
from trainers.run import run
from trainers.training import checkpoint_folders
from trainers.training.checkpoint import read_checkpoint


def test_three_steps_and_three_more_equal_six(settings, tmp_path, captioned_photos):
    overrides = (
        f"data.instance_data_dir={captioned_photos}",
        *VARIED_CAPTIONS,
        "train.ema_decay=0.9",
        "lora.dropout=0.1",
        "data.random_flip=true",
        "optimizer.lr_scheduler=constant",
    )
    whole = settings(*overrides, f"output_dir={tmp_path}/whole")
    parts = settings(*overrides, f"output_dir={tmp_path}/parts")
    run(whole)
    run_steps(parts, 3)
    run(parts)
    assert losses(whole) == losses(parts)
    assert lora(whole).keys() == lora(parts).keys()
    assert all(torch.equal(lora(whole)[name], lora(parts)[name]) for name in lora(whole))


CHANGES = {
    "lora.rank=4": "lora.rank: was 2, is 4",
    "seed=1": "seed: was 0, is 1",
    "data.instance_prompt=d": "data.instance_prompt: was a b c, is d",
    "train.train_batch_size=3": "global batch: was 2, is 3",
    "model.clip_chunks=2": "model.clip_chunks: was 1, is 2",
    "data.trigger=d": "data.trigger: was null, is d",
    "data.caption_prefix=d": 'data.caption_prefix: was "", is d',
    "data.caption_suffix=d": "with another caption or label",
    "data.caption_lines=choose": "data.caption_lines: was join, is choose",
    "data.shuffle_tags=true": "data.shuffle_tags: was false, is true",
    "data.tag_dropout=0.5": "data.tag_dropout: was 0.0, is 0.5",
}


def test_resuming_another_configuration_is_refused_and_the_key_is_named(settings):
    run(settings("train.max_train_steps=2"))
    for change, words in CHANGES.items():
        with pytest.raises(UserError, match="was made by another configuration") as caught:
            run(settings(change))
        assert words in str(caught.value)
    more = ("data.shuffle_tags=true", "data.keep_tags=1", "data.caption_variants=3")
    with pytest.raises(UserError, match=r"(?s)data\.keep_tags: .*data\.caption_variants: was 8"):
        run(settings(*more))


def test_a_finished_run_is_never_overwritten(settings):
    run(settings("train.max_train_steps=2"))
    with pytest.raises(UserError, match="holds a run already"):
        run(settings("checkpoint.resume_from_checkpoint=null"))


def test_a_damaged_checkpoint_is_passed_over(settings):
    run(settings())
    newest = settings().output_dir / "checkpoints" / "step-000006" / "denoiser.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = lora(settings())
    with pytest.warns(UserWarning, match="step-000006 is damaged"):
        run(settings())
    assert all(torch.equal(before[name], lora(settings())[name]) for name in before)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(settings, monkeypatch):
    class Killed(BaseException):
        pass

    def half(folder, ignore_errors=False):
        if "000002" in str(folder) and not ignore_errors:
            next(folder.glob("*.safetensors")).unlink()
            raise Killed
        shutil.rmtree(folder, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folders, "shutil", SimpleNamespace(rmtree=half))
        with pytest.raises(Killed):
            run(settings("checkpoint.checkpoints_total_limit=1", "checkpoint.keep_loras=0"))
    root = settings().output_dir / "checkpoints"
    assert all(read_checkpoint(folder) for folder in run_folder.list_checkpoints(root))
    run(settings())
    assert not list(root.glob(".*"))
