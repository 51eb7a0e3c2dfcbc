"""Fixtures of the tests of LoRA files: a tiny SD1.5, and what is said of a file for it."""

import pytest
import torch
from safetensors.torch import save_file

from tests.shared.true_sizes import TRUE_SIZES, true_size_base
from trainers.config import ModelConfig
from trainers.config.family_facts import family_facts
from trainers.errors import UserError
from trainers.families import FAMILIES
from trainers.lora.base_layers import adaptable_shapes
from trainers.lora.files import read_lora
from trainers.lora.names import released_rows, underscored
from trainers.lora.update import LoraUpdate

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
QUERY = f"{ATTENTION}.attn1.to_q"  # 8 to 8
KEY = f"{ATTENTION}.attn2.to_k"  # 16 to 8
CONVOLUTION = "unet.down_blocks.0.attentions.0.proj_in"  # 8 to 8, 1 x 1


@pytest.fixture(name="family", scope="module")
def sd15_family(bases):
    model = ModelConfig(family="sd15", pretrained_model_name_or_path=str(bases["sd15"]))
    return FAMILIES["sd15"](model)


@pytest.fixture(name="refused")
def refusal_message(family, tmp_path):
    """The message about a file with these tensors and metadata, or with these bytes."""

    def read(content, metadata=None, name="file.safetensors"):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            save_file(content, tmp_path / name, metadata)
        with pytest.raises(UserError) as error:
            read_lora(tmp_path / name, family)
        return str(error.value)

    return read


def pair(name=QUERY, rank=2, inputs=8, outputs=8):
    return {
        f"{name}.lora_A.weight": torch.ones(rank, inputs),
        f"{name}.lora_B.weight": torch.ones(outputs, rank),
    }


def random_lora(family, rank=2, start="", seed=0):
    """A LoRA on every layer whose name begins with `start`."""
    rng, lora = torch.Generator().manual_seed(seed), {}
    for name, (outputs, *inputs) in adaptable_shapes(family).items():
        if name.startswith(start):
            a = torch.randn(rank, *inputs, generator=rng)
            kernel = [1] * (len(inputs) - 1)
            lora[name] = LoraUpdate(a, torch.randn(outputs, rank, *kernel, generator=rng))
    return lora


def read_state(state, family, folder):
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "x.safetensors")
    return read_lora(folder / "x.safetensors", family)


@pytest.fixture(scope="session")
def true_bases(tmp_path_factory):
    """Family name -> the family of a base of true size, without a weight."""
    return {name: true_size_base(tmp_path_factory.mktemp(name), name) for name in TRUE_SIZES}


def denoiser_names(layers, name):
    """kohya's names of the denoiser's layers of a family."""
    return underscored("lora_unet_", released_rows(layers, family_facts(name).kohya))
