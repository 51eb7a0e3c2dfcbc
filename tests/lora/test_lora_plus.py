"""LoRA+: the learning rate of lora_B is so many times that of lora_A, in each part that trains."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from trainers.config import loading
from trainers.distributed.trained_weights import trainable_parameters

PLUS = "optimizer.lora_plus_ratio=16"
TEXT = ("train.train_text_encoder=true", "optimizer.text_encoder_lr=1e-3")


def rates(module, optimizer):
    """The learning rate of each trained parameter by its name."""
    names = {parameter: name for name, parameter in trainable_parameters(module).items()}
    groups = optimizer.param_groups
    return {names[p]: group["lr"] for group in groups for p in group["params"]}


def test_the_groups_are_those_of_peft(build):
    task = build(PLUS)
    denoiser = task.family.denoiser
    theirs = create_loraplus_optimizer(
        denoiser, torch.optim.SGD, lr=task.config.optimizer.learning_rate, loraplus_lr_ratio=16
    )
    ours = rates(denoiser, task.players["denoiser"].optimizer)
    assert ours == rates(denoiser, theirs)
    assert set(ours.values()) == {1e-2, 16 * 1e-2}


@pytest.mark.parametrize("dora", ["false", "true"])
def test_a_first_step_of_adam_moves_each_weight_by_its_rate(build, dora):
    task = build(PLUS, "optimizer.weight_decay=0", f"lora.use_dora={dora}")
    trained = trainable_parameters(task.module)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    task.players["denoiser"].optimizer.step()
    for name, parameter in trained.items():
        moved = 16e-2 if ".lora_B." in name else 1e-2
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, moved))


def test_a_text_encoders_rate_has_the_ratio_too(build):
    task = build(PLUS, *TEXT, family="sd3")
    found = rates(task.module, task.players["denoiser"].optimizer)
    for name, rate in found.items():
        part = 1e-2 if name.startswith("denoiser.") else 1e-3
        assert rate == pytest.approx(part * (16 if ".lora_B." in name else 1)), name
    assert len(set(found.values())) == 4
    # the schedule multiplies each
    task.players["denoiser"].set_learning_rate(0.5)
    halved = rates(task.module, task.players["denoiser"].optimizer)
    assert halved == {name: rate / 2 for name, rate in found.items()}


def test_without_it_a_part_has_one_group(build):
    task = build(*TEXT, family="sd3")
    assert len(task.players["denoiser"].optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optimizer": {"name": "prodigy"}}, "Prodigy finds one rate"),
        ({"lora": None}, "all weights are trained"),
        ({"kind": "gan"}, "has no effect with gan, only with dreambooth"),
    ],
)
def test_it_is_refused_where_there_is_no_rate_of_b(monkeypatch, tree, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    tree = {"kind": "dreambooth"} | tree
    tree["optimizer"] = tree.get("optimizer", {}) | {"lora_plus_ratio": 16}
    _, mistakes = loading.validate(tree, needs_pictures=False)
    (line,) = [line for line in mistakes if line.startswith("optimizer.lora_plus_ratio")]
    assert message in line
