"""What Flux.2-klein alone has: statistics that normalize patches, distilled kin, tied weights."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file

from tests.shared.families import whole
from trainers.data.crops import Crop
from trainers.data.encoder_cache import CachedEncoder
from trainers.data.photo_sets import load_instance_pictures
from trainers.data.rng import SampleRng
from trainers.errors import UserError
from trainers.families import FAMILIES

NAME = "flux2_klein"


@torch.no_grad()
def test_latents_without_spread_are_those_of_the_pipelines_own_encoding(settings, pipes):
    family, pipe = whole(settings(family=NAME)), pipes[NAME]
    pixels = torch.rand(1, 3, 16, 24) * 2 - 1
    moments = family.encode_images(pixels)
    moments[:, moments.shape[1] // 2 :] = -1000
    ours = family.latents(moments, SampleRng(0, 0, [0]))
    theirs = Flux2KleinPipeline._unpatchify_latents(pipe._encode_vae_image(pixels, None))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.fixture
def two_families(settings, bases, tmp_path):
    """The base, and one whose autoencoder differs in a statistic alone."""
    shutil.copytree(bases[NAME], tmp_path / "other")
    file = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["bn.running_var"][0] *= 2
    save_file(state, file, {"format": "pt"})
    other = settings(f"model.pretrained_model_name_or_path={tmp_path / 'other'}", family=NAME)
    return [FAMILIES[NAME](config.model) for config in (settings(family=NAME), other)]


def test_the_statistics_decide_the_latents_and_the_keys_of_the_cache(
    settings, two_families, tmp_path
):
    moments = torch.randn(1, 8, 4, 4)
    one, two = (family.latents(moments, SampleRng(0, 0, [0])) for family in two_families)
    differing = (one != two).nonzero()
    # of the first channel, the upper left of each patch
    assert len(differing) == 4
    assert all(c == 0 and y % 2 == 0 and x % 2 == 0 for _, c, y, x in differing.tolist())
    picture = load_instance_pictures(settings(family=NAME).data)[0]
    keys = [
        CachedEncoder(family, tmp_path, True, ()).image_key(picture, Crop.square(16))
        for family in two_families
    ]
    assert keys[0] != keys[1]


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_distilled_base_is_refused(settings, bases, tmp_path):
    folder = shutil.copytree(bases[NAME], tmp_path / "distilled")
    change(folder / "model_index.json", is_distilled=True)
    config = settings(f"model.pretrained_model_name_or_path={folder}", family=NAME)
    with pytest.raises(UserError, match=r"distilled to few steps.*FLUX\.2-klein-base-4B"):
        FAMILIES[NAME](config.model)


def test_a_scheduler_with_a_shift_of_its_own_is_followed(settings, bases, tmp_path):
    folder = shutil.copytree(bases[NAME], tmp_path / "base")
    change(folder / "scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=2.5)
    config = settings(f"model.pretrained_model_name_or_path={folder}", family=NAME)
    family = FAMILIES[NAME](config.model)
    family.load()
    assert family.make_objective(config.objective, (8, 8)).shift == 2.5


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.layers.3.mlp.up_proj.weight", "lack 1 tensors, for example model.layers.3.mlp"),
        ("model.embed_tokens.weight", "lack"),
        (None, ""),
    ],
)
def test_a_language_model_that_lacks_a_tensor_is_refused(settings, bases, tmp_path, lost, message):
    """The head is the embedding, and not in its files."""
    folder = shutil.copytree(bases[NAME], tmp_path / "base")
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    assert "lm_head.weight" not in state
    if lost:
        del state[lost]
        save_file(state, file, {"format": "pt"})
    config = settings(f"model.pretrained_model_name_or_path={folder}", family=NAME)
    family = FAMILIES[NAME](config.model)
    with pytest.raises(UserError, match=message) if lost else nullcontext():
        family.load("text_encoder")
