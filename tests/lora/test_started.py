"""PiSSA and OLoRA start as PEFT's do, leave the base as it is, and are written as plain LoRA."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.shared.families import whole
from trainers.config import LoraConfig, loading
from trainers.distributed.trained_weights import trainable_parameters, trainable_state
from trainers.errors import UserError
from trainers.lora import started
from trainers.lora.files import read_lora
from trainers.lora.initial import adapted_layers
from trainers.lora.layers import add_adapter, add_lora, predict_base
from trainers.run_folder import KOHYA_NAME, WEIGHT_NAME

KINDS = ("pissa", "olora")


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_that_of_peft(pipes, kind):
    denoiser = pipes["sd15"].unet
    ours, theirs = (type(denoiser).from_config(denoiser.config) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    layers = ["to_q", "ff.net.0.proj", "ff.net.2"]
    settings = {"rank": 3, "alpha": 6.0, "target_modules": layers, "init_lora_weights": kind}
    add_adapter(ours, LoraConfig(**settings))
    theirs.add_adapter(PeftConfig(r=3, lora_alpha=6, target_modules=layers, init_lora_weights=kind))
    others = dict(theirs.named_modules())
    for name, layer in ours.named_modules():
        if isinstance(layer, LoraLayer):
            theirs_layer = others[name]
            part = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            wanted = theirs_layer.get_delta_weight("default")
            # their base lacks the part, ours has it and the layer takes it off
            weight = theirs_layer.base_layer.weight + wanted
            # where singular values lie close together, several parts are as good
            left, least = (weight - part).norm(), (weight - wanted).norm()
            assert abs(left - least) < 1e-3 * weight.norm()
            if kind == "olora":
                torch.testing.assert_close(part, wanted, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(layer.base_layer.weight, weight, rtol=1e-3, atol=1e-5)
            assert layer.get_delta_weight("default").abs().max() < 1e-6
            assert layer.lora_A["default"].weight.norm() > 0.01


@pytest.mark.parametrize(("kind", "family"), [("pissa", "sd15"), ("olora", "flux")])
def test_the_file_is_plain_lora_of_twice_the_rank_for_the_same_base(
    build, bases, pipes, tmp_path, kind, family
):
    task = build(f"lora.init_lora_weights={kind}", "lora.alpha=3", "lora.kohya=true", family=family)
    torch.manual_seed(0)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    task.save(tmp_path)
    plain = dict(getattr(pipes[family], task.family.denoiser_name).named_parameters())
    wanted = {}
    for name, layer in adapted_layers(task.family, ()):
        own = name.partition(".")[2]
        assert torch.equal(layer.base_layer.weight, plain[f"{own}.weight"])
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        scale = layer.scaling["default"]
        wanted[name] = scale * (b.weight @ a.weight - b.start @ a.start)
    for file in (WEIGHT_NAME, KOHYA_NAME):
        lora = read_lora(tmp_path / file, task.family)
        assert lora.keys() == wanted.keys()
        for name, update in lora.items():
            torch.testing.assert_close(update.delta_weight(), wanted[name], rtol=1e-4, atol=1e-5)
    updates = read_lora(tmp_path / WEIGHT_NAME, task.family).values()
    assert {update.rank for update in updates} == {4}
    # a reader in half precision rounds by the size of the update, not of what it started with
    for update in updates:
        assert update.a.norm() * update.b.norm() < 4 * update.delta_weight().norm()
    pipe = DiffusionPipeline.from_pretrained(bases[family])
    pipe.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)
    task.family.pipe.register_modules(**{task.family.denoiser_name: task.module.denoiser})
    expected = task.probe_output("a b c")
    task.module.denoiser = getattr(pipe, task.family.denoiser_name)
    difference = (task.probe_output("a b c") - expected).norm() / expected.norm()
    assert difference < 1e-5


def test_at_step_0_and_without_lora_it_is_the_base(build, pipes):
    task = build("lora.init_lora_weights=pissa", "lora.target_modules=all-linear")
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 32)
    width = task.family.denoiser.config.cross_attention_dim
    inputs = (*inputs[:2], torch.randn(1, 77, width))
    with torch.no_grad():
        base = pipes["sd15"].unet(*inputs).sample
        torch.testing.assert_close(task.family.denoiser(*inputs).sample, base, rtol=1e-4, atol=1e-5)
    for parameter in trainable_parameters(task.module).values():
        parameter.data += 1.0
    # the base of output preservation and of likeness
    assert torch.equal(predict_base(task.family.denoiser, inputs).sample, base)


def test_a_checkpoint_has_what_it_started_with(build):
    task = build("lora.init_lora_weights=olora")
    starts = [name for name in trainable_state(task.module) if name.endswith(".start")]
    assert len(starts) == len(trainable_parameters(task.module))


def test_what_has_no_such_part_is_an_error(settings):
    family = whole(settings(family="sd15"))
    config = LoraConfig(rank=4096, init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"pissa takes a part .* has none of rank 4096: lower"):
        add_lora(family, config, ())
    family = whole(settings(family="sd15"))
    config = LoraConfig(rank=2, init_lora_weights="olora", target_modules=["conv1"])
    with pytest.raises(UserError, match=r"olora is for linear layers, .* names \S+conv1: leave"):
        add_lora(family, config, ())


@pytest.mark.parametrize(
    "tree",
    [
        {"lora": {"use_dora": True}},
        {"lora": {"dropout": 0.1}},
        {"lora": {"init_from": "a/b"}},
        {"model": {"quantization": "nf4"}},
        {"model": {"quantization": "int8"}},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_be_combined_with_is_refused(tree, kind):
    tree = {**tree, "lora": tree.get("lora", {}) | {"init_lora_weights": kind}}
    _, mistakes = loading.validate(tree, needs_pictures=False)
    (line,) = [line for line in mistakes if line.startswith("lora.init_lora_weights")]
    ((section, keys),) = [item for item in tree.items() if item[0] != "lora" or len(tree) == 1]
    assert all(f"{section}.{key}" in line for key in keys if key != "init_lora_weights")


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_the_principal_part_is_that_of_the_singular_values(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    a, b = started.principal_part(weight, 4, 2.0)
    u, s, v = torch.linalg.svd(weight)
    best = u[:, :4] @ s[:4].diag() @ v[:4]
    torch.testing.assert_close(2.0 * b @ a, best, rtol=1e-3, atol=1e-3)
    assert nn.functional.mse_loss(2.0 * b @ a, best) < 1e-6
