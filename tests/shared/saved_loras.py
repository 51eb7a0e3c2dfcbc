"""Trained LoRA files of every family and format, and the updates that they should hold."""

import pytest
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tests.shared.runs import config_maker
from trainers import dreambooth
from trainers.config import ModelConfig
from trainers.families import FAMILIES
from trainers.lora.base_layers import text_prefix
from trainers.lora.update import LoraUpdate

ALL = ("sd15", "sdxl", "sd3", "flux")
TRAINED = ("lora.alpha=5", "train.train_text_encoder=true", "lora.kohya=true")


@pytest.fixture(scope="session")
def made(bases, photos, tmp_path_factory):
    """Family name -> (folder of a saved task, the updates that its modules compute), alpha != rank,
    nothing zero."""
    results = {}
    for name in ALL:
        folder = tmp_path_factory.mktemp(name)
        config = config_maker(bases, photos, folder)(
            *TRAINED, "lora.target_modules=all-linear", family=name
        )
        task, _, _ = dreambooth.build(config, Accelerator(cpu=True))
        torch.manual_seed(0)
        updates = {}
        for part in (task.family.denoiser_name, *task.encoder.trained_encoders):
            module = getattr(task.family.pipe, part)
            for layer_name, layer in module.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    nn.init.normal_(layer.lora_B["default"].weight)
                    delta = layer.get_delta_weight("default").detach()
                    updates[f"{part}.{text_prefix(module)}{layer_name}"] = delta.flatten(1)
        folder = config.output_dir
        folder.mkdir(exist_ok=True)
        task.save(folder)
        results[name] = folder, updates
    return results


def check(found, wanted, tolerance=1e-5):
    """Name -> product, all there and near."""
    assert found.keys() == wanted.keys()
    for name, product in wanted.items():
        assert (found[name] - product).norm() <= tolerance * product.norm(), name


def products(lora):
    return {name: update.delta_weight() for name, update in lora.items()}


def family_of(folder_of_base, name):
    return FAMILIES[name](
        ModelConfig(family=name, pretrained_model_name_or_path=str(folder_of_base))
    )


def random_lora(layers, inputs, seed=0, ranks=(2,)):
    rng = torch.Generator().manual_seed(seed)
    lora = {}
    for i, (name, outputs) in enumerate(layers.items()):
        rank = ranks[i % len(ranks)]
        a = torch.randn((rank, *inputs[name]), generator=rng)
        lora[name] = LoraUpdate(a, torch.randn((outputs, rank, *[1] * (a.ndim - 2)), generator=rng))
    return lora
