"""A damaged checkpoint or cache entry is known and never used."""

import os
import random
import shutil

import pytest

from tests.shared.disturbed_runs import assert_same, checkpoint, flipped, names
from trainers.data.encoder_cache import CachedEncoder, TensorCache
from trainers.errors import RunFailedError, UserError
from trainers.run import run
from trainers.training.checkpoint import read_checkpoint


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
