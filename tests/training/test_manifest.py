"""A checkpoint's manifest has one form, and a checkpoint fits the run that goes on from it."""

import json
import os

import pytest
import torch

from trainers.errors import UserError
from trainers.run_folder import MANIFEST_NAME
from trainers.training.checkpoint import check_files, copy_tensors
from trainers.training.loop import Player
from trainers.training.manifest import manifest_checksum, read_checkpoint, read_manifest

FACTS = {
    "pictures": {"instance": {"count": 1, "digest": "d", "files": {"a.png": ["b", "c"]}}},
    "base": {"unet": "d"},
    "mixed precision": "no",
    "global batch": 2,
    "initial LoRA": None,
    "config": {"seed": 0, "train.max_train_steps": 4},
}
EXTENSION = {"from_step": 3, "max_train_steps": 9, "before": 4, "end": ""}


def write_manifest(folder, **changes):
    manifest = {"step": 3, "rollbacks": 0, "end": "", "files": {}, "facts": FACTS, "scaler": None}
    manifest |= changes
    manifest["sha256"] = manifest_checksum(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), "utf-8")


def test_a_manifest_of_this_form_is_read(tmp_path):
    write_manifest(tmp_path, extensions=[EXTENSION], later_versions="may say more")
    assert read_manifest(tmp_path)["step"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"step": True},
        {"step": -1},
        {"step": 10**30},
        {"step": "3"},
        {"rollbacks": 1.5},
        {"rollbacks": 10**6},
        {"end": None},
        {"files": {"../../x": "d"}},
        {"files": {"/etc/hosts": "d"}},
        {"files": {"denoiser.safetensors": None}},
        {"facts": None},
        {"facts": FACTS | {"config": 3}},
        {"facts": FACTS | {"base": []}},
        {"facts": FACTS | {"pictures": {"instance": -1}}},
        {"facts": FACTS | {"pictures": {"instance": {"files": {"a.png": ["b"]}}}}},
        {"facts": FACTS | {"initial LoRA": 3}},
        {"facts": FACTS | {"config": {"train.max_train_steps": "many"}}},
        {"extensions": "3"},
        {"extensions": [{"max_train_steps": 4}]},
        {"scaler": "x"},
    ],
)
def test_one_of_another_form_is_none_whatever_its_checksum_says(tmp_path, changes):
    write_manifest(tmp_path, **changes)
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("name", [MANIFEST_NAME, "denoiser.safetensors"])
def test_a_pipe_is_no_file_of_a_checkpoint(tmp_path, name):
    write_manifest(tmp_path, files={"denoiser.safetensors": "d"})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert read_checkpoint(tmp_path) is None


def test_a_checkpoint_has_the_files_of_each_player(tmp_path):
    player = Player(torch.nn.Linear(1, 1), torch.optim.SGD([torch.ones(1)]), None)
    names = ["denoiser.safetensors", "denoiser.optimizer.pt"]
    check_files(tmp_path, "denoiser", player, dict.fromkeys(names, b""))
    for missing in names:
        files = {name: b"" for name in names if name != missing}
        with pytest.raises(UserError, match=rf"has no {missing}"):
            check_files(tmp_path, "denoiser", player, files)


@pytest.mark.parametrize(
    "sources",
    [{}, {"a": torch.ones(1)}, {"b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}],
)
def test_weights_of_other_names_or_shapes_are_refused_before_any_is_copied(sources):
    """One number would be spread over all of a weight."""
    targets = {"a": torch.zeros(2)}
    with pytest.raises(UserError, match="other weights"):
        copy_tensors(targets, sources)
    assert targets["a"].tolist() == [0, 0]
