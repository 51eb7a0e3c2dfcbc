"""The learning rate against diffusers' schedulers, the optimizers on a quadratic, the weight
average in closed form."""

import importlib.util
from math import prod
from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from trainers.config import OptimizerConfig
from trainers.training.optimizers import (
    EMA,
    LR_SCHEDULES,
    OPTIMIZERS,
    make_lr_schedule,
    make_optimizer,
)

NAMES = get_args(OptimizerConfig.model_fields["name"].annotation)
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
    if name == "prodigy" and importlib.util.find_spec("prodigyopt") is None:
        pytest.skip("prodigyopt is not installed")
    rate = 1.0 if name == "prodigy" else 0.05
    w = nn.Parameter(torch.ones(64, 128))  # bitsandbytes keeps 8-bit states from 4096 numbers on
    optimizer = make_optimizer(
        OptimizerConfig(name=name, learning_rate=rate), [{"params": [w], "lr": rate}]
    )
    for _ in range(30):
        w.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert w.square().mean() < 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_each_group_keeps_its_own_rate(name):
    still, moving = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    groups = [{"params": [still], "lr": 0.0}, {"params": [moving], "lr": 0.1}]
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.1), groups)
    (still.square().sum() + moving.square().sum()).backward()
    optimizer.step()
    assert torch.equal(still, torch.ones(8))
    assert (moving < 1).all()


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
    for key, table in (("name", OPTIMIZERS), ("lr_scheduler", LR_SCHEDULES)):
        named = get_args(OptimizerConfig.model_fields[key].annotation)
        assert set(named) == table.keys()
