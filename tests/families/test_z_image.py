"""What Z-Image alone has: words of each prompt's own number, levels of names, its longest side."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.shared.families import conditioned
from tests.shared.language_models import LENGTH, TOKENS
from trainers import dreambooth
from trainers.errors import UserError
from trainers.families import FAMILIES

NAME = "z_image"


@pytest.fixture
def family(settings):
    """With its text encoder and transformer."""
    family = FAMILIES[NAME](settings(LENGTH, family=NAME).model)
    family.load("text_encoder", "transformer")
    return family


@torch.no_grad()
def test_what_pads_a_prompt_is_never_read(family):
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    condition = conditioned(family, "a b c", "ab")
    # three marks come before the words, and five after them
    assert condition["lengths"].tolist() == [3 + 5 + 5, 3 + 2 + 5]
    assert condition["words"].shape[1] == TOKENS
    expected = family.predict(family.denoiser, x_t, t, condition)
    changed = dict(condition, words=condition["words"].clone())
    changed["words"][0, 13:] = 7
    changed["words"][1, 10:] = -7
    assert torch.equal(family.predict(family.denoiser, x_t, t, changed), expected)
    changed["words"][1, 9] += 1
    ours = family.predict(family.denoiser, x_t, t, changed)
    assert torch.equal(ours[0], expected[0])
    assert (ours[1] - expected[1]).abs().max() > 1e-5


def test_lengths_stay_where_they_can_be_read_without_a_wait(settings):
    """On a device each number of words would have to be waited for, in each step."""
    _, batches, _ = dreambooth.build(settings(LENGTH, family=NAME), Accelerator(cpu=True))
    batches.device = "meta"
    (batch, _), *_ = batches(0)
    text = batch["text"]
    assert text["text_encoder"].device.type == "meta"
    assert text["text_encoder_length"].device.type == "cpu"
    assert text["text_encoder_length"].tolist() == [13, 13]


@pytest.mark.parametrize("is_whole", [True, False])
def test_names_with_the_level_of_a_whole_language_model_are_read(
    settings, bases, tmp_path, is_whole
):
    """The released index names the inner model, and the files are of the whole one."""
    folder = shutil.copytree(bases[NAME], tmp_path / "base")
    file = folder / "text_encoder" / "model.safetensors"
    state = {f"model.{key}": tensor for key, tensor in load_file(file).items()}
    if not is_whole:
        del state["model.layers.1.self_attn.q_norm.weight"]
    save_file(state, file, {"format": "pt"})
    family = FAMILIES[NAME](
        settings(f"model.pretrained_model_name_or_path={folder}", family=NAME).model
    )
    if not is_whole:
        with pytest.raises(UserError, match="lack 1 tensors"):
            family.load("text_encoder")
        return
    family.load("text_encoder")
    loaded = family.pipe.text_encoder.state_dict()
    assert all(torch.equal(loaded[key.removeprefix("model.")], state[key]) for key in state)


def test_the_longest_side_is_that_of_its_positions(family):
    # 32 places of patches of 2 x 2 latents, each of 2 x 2 pixels
    assert family.max_side == 32 * 2 * 2
