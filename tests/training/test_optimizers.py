"""The learning rate against diffusers' schedulers, the optimizers on a quadratic, the weight
average in closed form."""

from math import prod
from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from trainers.config import OptimizerConfig
from trainers.config.base_sections import FINDS_RATE, OPTIMIZER_KEYS, SCHEDULE_FREE
from trainers.errors import UserError
from trainers.training.averages import EMA, make_average
from trainers.training.optimizers import (
    LR_SCHEDULES,
    OPTIMIZERS,
    make_lr_schedule,
    make_optimizer,
    try_optimizer,
)

NAMES = list(OPTIMIZERS)
SCHEDULES = get_args(OptimizerConfig.model_fields["lr_scheduler"].annotation)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "cycles", "power"), [(0, 1, 1.0), (7, 3, 2.0), (49, 2, 0.5)])
def test_the_rate_equals_diffusers_at_every_step(schedule, warmup, cycles, power):
    steps, peak, warmup = 50, 3e-3, 0 if schedule == "constant" else warmup
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_scheduler(schedule, optimizer, None, warmup, steps, cycles, power)
    ours = make_lr_schedule(
        OptimizerConfig(
            learning_rate=peak,
            lr_scheduler=schedule,
            lr_warmup_steps=warmup,
            lr_num_cycles=cycles,
            lr_power=power,
        ),
        steps,
    )
    for step in range(steps):
        assert ours(step) * peak == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15
        ), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_optimiser_lowers_a_quadratic(name):
    pytest.importorskip(OPTIMIZERS[name].module)
    rate = 1.0 if name in FINDS_RATE else 0.05
    # bitsandbytes keeps 8-bit states from 4096 numbers on
    w = nn.Parameter(torch.randn(64, 128).sign())
    optimizer = make_optimizer(
        OptimizerConfig(name=name, learning_rate=rate), [{"params": [w], "lr": rate}]
    )
    make_average(nn.ParameterList([w]), optimizer, None)
    values = []
    for _ in range(150):
        w.square().mean().backward()
        values.append(w.square().mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert min(values) < 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FINDS_RATE])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_each_group_keeps_its_own_rate(name):
    pytest.importorskip(OPTIMIZERS[name].module)
    still, moving = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(2, 4))
    groups = [{"params": [still], "lr": 0.0}, {"params": [moving], "lr": 0.1}]
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.1), groups)
    make_average(nn.ParameterList([still, moving]), optimizer, None)
    (still.square().sum() + moving.square().sum()).backward()
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 4))
    assert (moving < 1).all()


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_schedule_free_average_is_that_of_the_steps_and_two_swaps_change_nothing(name):
    """x of Defazio et al. 2024; the weights, y, lie between it and z by beta1."""
    pytest.importorskip(OPTIMIZERS[name].module)
    layer, config = nn.Linear(8, 8, bias=False), OptimizerConfig(name=name, weight_decay=0)
    optimizer = make_optimizer(config, [{"params": list(layer.parameters()), "lr": 1e-2}])
    average = make_average(layer, optimizer, None)
    for _ in range(5):
        layer(torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y, z = layer.weight.detach().clone(), optimizer.state[layer.weight]["z"]
    average.swap()
    x = layer.weight.detach().clone()
    torch.testing.assert_close(y, torch.lerp(z.view_as(x), x, config.betas[0]))
    average.swap()
    assert torch.equal(layer.weight, y)
    assert torch.equal(average.average["weight"], x)
    assert torch.equal(layer.weight, y)


def test_a_class_of_any_package_is_taken_with_its_arguments():
    config = OptimizerConfig(name="torch.optim.SGD", arguments={"momentum": 0.9})
    weight = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(config, [{"params": [weight], "lr": 0.3}])
    assert type(optimizer) is torch.optim.SGD
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "momentum")} == {
        "lr": 0.3,
        "momentum": 0.9,
    }


REFUSED = {
    "torch.optim.Nothing": ({}, "torch.optim.Nothing cannot be imported"),
    "torch.nothing.Adam": ({}, "torch.nothing.Adam cannot be imported"),
    "torch.nn.Identity": ({}, "is no optimizer"),
    "pytest.exit": ({}, "is no optimizer"),
    "torch.optim.SGD": ({"nonsense": 3}, "refuses this with optimizer.arguments nonsense=3"),
    "adamw": ({"foreach": True}, "refuses this with optimizer.arguments foreach=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_optimizer_is_told_before_anything_is_loaded(name):
    arguments, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        try_optimizer(OptimizerConfig(name=name, arguments=arguments))


@pytest.fixture
def layer():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    return layer


def test_two_swaps_change_nothing(layer):
    ema = EMA(layer, 0.9)
    with torch.no_grad():
        layer.weight += 1
    ema.update(0)
    weight, average = layer.weight.clone(), ema.average["weight"].clone()
    ema.swap()
    assert torch.equal(layer.weight, average)
    assert not torch.equal(layer.weight, weight)
    ema.swap()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(ema.average["weight"], average)


def test_the_average_is_the_decayed_sum_of_all_weights(layer):
    """sum_i (1 - d_i) (prod_{j > i} d_j) w_i, with the start as w_-1 and 1 - d_-1 = 1."""
    ema, steps = EMA(layer, 0.5), 20
    history = [layer.weight.detach().clone().double()]
    for step in range(steps):
        with torch.no_grad():
            layer.weight += torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        ema.update(step)
        history.append(layer.weight.detach().clone().double())
    decays = [min(0.5, (1 + step) / (10 + step)) for step in range(steps)]
    shares = [1.0, *(1 - d for d in decays)]
    expected = sum(
        share * prod(decays[i:]) * w
        for i, (share, w) in enumerate(zip(shares, history, strict=True))
    )
    torch.testing.assert_close(ema.average["weight"].double(), expected)
    assert ema.average.keys() == {"weight"}  # what does not train is not averaged


def test_every_optimizer_and_schedule_that_a_config_can_name_has_its_row():
    assert OPTIMIZER_KEYS.keys() == OPTIMIZERS.keys()
    assert set(SCHEDULES) == LR_SCHEDULES.keys()
