"""Settings of a base in one file that are wrong are told; a cache that is damaged is made anew."""

import json
import shutil

import pytest

from tests.shared.single_files import base_of
from trainers.banners import describe_result
from trainers.cli import find_weights
from trainers.config import ModelConfig
from trainers.errors import RunFailedError, UserError
from trainers.families import FAMILIES
from trainers.original.convert import diffusers_folder


def model_of(path, settings, name="sd15"):
    return ModelConfig(family=name, pretrained_model_name_or_path=str(path), config=str(settings))


def rename_class(folder, library, name):
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {"unet": [library, name]}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "is no index"),
        (lambda folder: rename_class(folder, "diffusers", "NoUNet"), "names NoUNet of diffusers"),
        (lambda folder: rename_class(folder, "mine", "UNet"), "names UNet of mine"),
        (lambda folder: (folder / "unet/config.json").unlink(), r"unet/config\.json of the sett"),
    ],
)
def test_damaged_settings_are_told(files, tmp_path, damage, message):
    path, settings, _ = files["sd15"]
    shutil.copytree(settings, tmp_path / "settings")
    damage(tmp_path / "settings")
    with pytest.raises(UserError, match=rf"model\.config: .*{message}"):
        diffusers_folder(model_of(path, tmp_path / "settings"))


def test_settings_of_another_pipeline_are_told_before_a_weight_is_read(files, recwarn):
    message = r"model\.config: .* of a StableDiffusion3Pipeline, but .* StableDiffusionXLPipeline"
    with pytest.raises(UserError, match=message):
        FAMILIES["sdxl"](model_of(files["sdxl"][0], files["sd3"][1], "sdxl"))
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]


@pytest.mark.parametrize("rest", ["unet/diffusion_pytorch_model.safetensors", "tokenizer", "."])
def test_what_is_gone_from_the_cache_is_made_again(files, monkeypatch, tmp_path, rest):
    monkeypatch.setenv("DIFFUSION_TRAINERS_CACHE", str(tmp_path))
    model = model_of(*files["sd15"][:2])
    folder = diffusers_folder(model)
    whole = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder / rest) if (folder / rest).is_dir() else (folder / rest).unlink()
    assert diffusers_folder(model) == folder
    assert whole == {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_cache_that_cannot_be_written_is_told(files, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFUSION_TRAINERS_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailedError, match=r"another folder in .* DIFFUSION_TRAINERS_CACHE"):
        diffusers_folder(model_of(*files["sd15"][:2]))


def test_the_end_of_a_run_tells_how_diffusers_loads_the_base(settings, files):
    path, folder, _ = files["sd15"]
    config = settings(*base_of(path, folder))
    converted = diffusers_folder(config.model)
    assert f'from_pretrained("{converted}")' in dict(describe_result(config))["diffusers"]


def test_a_lora_file_on_a_base_in_one_file_is_given_settings(files, tmp_path):
    path, settings, _ = files["sd15"]
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"")
    config, _ = find_weights(lora, str(path), str(settings))
    assert config.model == model_of(path, settings)
    with pytest.raises(UserError, match="is for a base in one file"):
        find_weights(lora, str(settings), str(settings))
