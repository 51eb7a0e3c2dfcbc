"""A base is read from safetensors alone, whole ones: a pickle is refused before it is opened."""

import shutil

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from trainers.config import ModelConfig
from trainers.errors import UserError
from trainers.families import FAMILIES


def open_base(folder, **keys):
    model = ModelConfig(family="sd15", pretrained_model_name_or_path=str(folder), **keys)
    return FAMILIES["sd15"](model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_with_pickles_alone_is_refused_by_name(bases, tmp_path, part):
    pipe = DiffusionPipeline.from_pretrained(bases["sd15"])
    pipe.save_pretrained(tmp_path)
    for file in (tmp_path / part).glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=rf"weights in .*{part} are \.bin files alone"):
        open_base(tmp_path)


def test_pickles_beside_safetensors_are_not_opened(bases, tmp_path):
    DiffusionPipeline.from_pretrained(bases["sd15"]).save_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        for file in (tmp_path / part).glob("*.safetensors"):
            file.with_suffix(".bin").write_bytes(b"not a pickle")
    open_base(tmp_path).load("unet", "vae", "text_encoder")


def test_safetensors_of_a_variant_need_that_variant(bases, tmp_path):
    DiffusionPipeline.from_pretrained(bases["sd15"]).save_pretrained(tmp_path, variant="fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"model\.variant"):
        open_base(tmp_path)
    open_base(tmp_path, variant="fp16").load("unet", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("unet", lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a whole safetensor"),
        ("unet", lambda path: path.unlink(), "cannot be loaded"),
        ("unet", lambda path: drop_tensor(path, "conv_out.weight"), "lack 1 tensors.*conv_out"),
        ("text_encoder", lambda path: drop_tensor(path, "final_layer_norm.bias"), "lack 1 tensors"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(bases, tmp_path, part, damage, message):
    """transformers draws random numbers in place of what is missing, and says so in its log."""
    shutil.copytree(bases["sd15"], tmp_path / "base")
    (path,) = (tmp_path / "base" / part).glob("*.safetensors")
    damage(path)
    model = ModelConfig(family="sd15", pretrained_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(UserError, match=rf"(?s){message}"):
        FAMILIES["sd15"](model).load(part)


def drop_tensor(path, ending):
    state = {key: value for key, value in load_file(path).items() if not key.endswith(ending)}
    save_file(state, path, {"format": "pt"})
