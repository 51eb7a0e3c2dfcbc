"""LoRA on the convolutions of a U-Net's blocks: which they are, and who loads its files."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.shared.families import UNETS
from trainers import dreambooth
from trainers.config import loading
from trainers.lora.files import read_lora
from trainers.lora.initial import adapted_layers
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

PRESET = "lora.target_modules=attention+mlp+conv"
OUTSIDE = {"conv_in", "conv_out"}


@pytest.mark.parametrize("name", UNETS)
def test_they_are_trained_and_every_reader_finds_them(settings, bases, tmp_path, name):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = settings(PRESET, "lora.alpha=3", "lora.rank_pattern={conv|conv.: 1}", family=name)
    task = dreambooth.build(config, Accelerator(cpu=True))[0]
    torch.manual_seed(0)
    wanted, kinds = {}, {}
    for key, layer in adapted_layers(task.family, ()):
        nn.init.normal_(layer.lora_B["default"].weight)
        wanted[key] = layer.get_delta_weight("default").detach()
        kinds[key.removeprefix("unet.")] = type(layer.base_layer)
    modules = task.family.denoiser.named_modules()
    all_convolutions = {
        n.removesuffix(".base_layer")
        for n, m in modules
        if type(m) is nn.Conv2d and "lora_" not in n
    }
    assert {n for n, kind in kinds.items() if kind is nn.Conv2d} == all_convolutions - OUTSIDE
    assert any("mid_block.resnets" in key for key in kinds)
    assert any(key.endswith("ff.net.2") for key in kinds)
    task.save(tmp_path)
    for file in (WEIGHT_NAME, KOHYA_NAME):
        lora = read_lora(tmp_path / file, task.family)
        assert lora.keys() == wanted.keys()
        pipe = DiffusionPipeline.from_pretrained(bases[name])
        pipe.load_lora_weights(tmp_path, weight_name=file)
        loaded = dict(pipe.unet.named_modules())
        for key, delta in wanted.items():
            layer = loaded[key.removeprefix("unet.")]
            assert isinstance(layer, LoraLayer), (file, key)
            (adapter,) = layer.lora_A
            torch.testing.assert_close(lora[key].delta_weight().view_as(delta), delta)
            torch.testing.assert_close(layer.get_delta_weight(adapter), delta)


def test_a_transformer_has_none():
    tree = {"model": {"family": "flux"}, "lora": {"target_modules": "attention+mlp+conv"}}
    _, mistakes = loading.validate(tree, needs_pictures=False)
    (line,) = [line for line in mistakes if line.startswith("lora.target_modules")]
    assert line.endswith("the blocks of Flux.1 have no convolutions: use attention+mlp")
