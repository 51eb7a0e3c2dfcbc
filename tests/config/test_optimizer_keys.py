"""Each optimizer has the settings that it takes; another is an error, as is a rate
that teaches nothing, and a warm-up fits into its run."""

import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.shared.processes import ROOT
from trainers.config import OptimizerConfig, loading
from trainers.config.base_sections import FINDS_RATE, OPTIMIZER_KEYS
from trainers.errors import UserError
from trainers.training.optimizers import LR_SCHEDULES, OPTIMIZERS, make_optimizer

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# of each setting a value that is not its default
OTHER = {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.5}
OTHER_BY_SCHEDULE = {"lr_num_cycles": 3, "lr_power": 2.0}


@pytest.fixture
def installed(monkeypatch):
    """Every optional package can be found but one."""
    found = {"no_such_package": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.get(name, True))


def refused(settings, *overrides, family="sd15"):
    with pytest.raises(UserError) as caught:
        settings(*overrides, family=family)
    return str(caught.value).splitlines()


def test_the_tables_of_optimizers_agree():
    assert OPTIMIZER_KEYS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZER_KEYS)
@pytest.mark.parametrize("key", OTHER)
def test_a_setting_is_taken_or_refused_by_name(settings, installed, name, key):
    overrides = [f"optimizer.name={name}", f"optimizer.{key}={OTHER[key]}"]
    if name in FINDS_RATE:
        overrides.append("optimizer.learning_rate=1")
    else:
        overrides.append("optimizer.learning_rate=1e-4")
    if key in OPTIMIZER_KEYS[name]:
        assert getattr(settings(*overrides).optimizer, key) != OptimizerConfig().model_dump()[key]
        return
    (line,) = refused(settings, *overrides)
    assert line.startswith(f"optimizer.{key}: has no effect with {name}")


@pytest.mark.parametrize("name", OPTIMIZER_KEYS)
def test_a_setting_that_is_taken_reaches_the_optimizer(monkeypatch, name):
    seen = {}

    def optimizer_class(groups, **options):
        seen.update(options)
        return torch.optim.SGD(groups, 0.1)

    entry = OPTIMIZERS[name]
    module = SimpleNamespace(**{entry.class_name: optimizer_class})
    monkeypatch.setitem(sys.modules, entry.module, module)
    config = OptimizerConfig(name=name, learning_rate=1, **OTHER)
    make_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))]}])
    given = {key for key in seen if key in OTHER}
    assert given == set(OPTIMIZER_KEYS[name])
    assert all(list(seen[key]) == OTHER[key] for key in given if key == "betas")


@pytest.mark.parametrize("key", OTHER_BY_SCHEDULE)
@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_a_setting_of_another_schedule_is_refused_by_name(settings, key, schedule):
    overrides = [f"optimizer.lr_scheduler={schedule}", f"optimizer.{key}={OTHER_BY_SCHEDULE[key]}"]
    takes = {"lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial"}
    if takes[key] == schedule:
        settings(*overrides)
        return
    (line,) = refused(settings, *overrides)
    assert line.startswith(f"optimizer.{key}: has no effect with {schedule}")


def test_prodigy_starts_from_one_unless_a_rate_is_given():
    assert OptimizerConfig(name="prodigy").learning_rate == 1.0
    assert OptimizerConfig(name="prodigy", learning_rate=0.5).learning_rate == 0.5
    assert OptimizerConfig().learning_rate == 1e-4


@pytest.mark.parametrize("kind", ["dreambooth", "gan", "autoencoder", "unet"])
def test_prodigy_has_its_rate_in_every_trainer(kind, installed):
    config, _ = loading.validate({"kind": kind, "optimizer": {"name": "prodigy"}})
    assert config.optimizer.learning_rate == 1.0


@pytest.mark.parametrize("rate", [1e-4, 3e-3, 9e-3])
def test_prodigy_with_a_rate_of_adamw_is_refused_with_what_to_do(settings, installed, rate):
    (line,) = refused(settings, "optimizer.name=prodigy", f"optimizer.learning_rate={rate}")
    assert line.startswith("optimizer.learning_rate: ")
    assert "set it near 1.0" in line


def test_prodigy_with_two_rates_is_refused(settings, installed):
    overrides = ["optimizer.name=prodigy", "optimizer.learning_rate=1"]
    text = ["train.train_text_encoder=true", "optimizer.text_encoder_lr=1"]
    (line,) = refused(settings, *overrides, *text)
    assert line.startswith("optimizer.text_encoder_lr: Prodigy finds one rate")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("steps", [1, 4])
def test_every_shipped_config_can_be_tried_for_a_few_steps(path, steps, installed, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = loading.load_config(path, [f"train.max_train_steps={steps}"])
    optimizer = config.optimizer
    assert optimizer.lr_warmup_steps == 0
    told = [str(warning.message) for warning in caught]
    assert len(told) == ("lr_warmup_steps" in path.read_text())
    assert all("optimizer.lr_warmup_steps" in message for message in told)


def test_a_warm_up_that_fits_is_left_alone(settings):
    overrides = ["optimizer.lr_scheduler=constant_with_warmup", "train.max_train_steps=50"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = settings(*overrides, "optimizer.lr_warmup_steps=49")
    assert config.optimizer.lr_warmup_steps == 49
    with pytest.warns(UserWarning, match=r"50 steps of warm-up .* takes 5"):
        config = settings(*overrides, "optimizer.lr_warmup_steps=50")
    assert config.optimizer.lr_warmup_steps == 5


MISTAKES = {
    "name=torch.optim.SGD,betas=[0.8,0.9]": "optimizer.betas: has no effect with torch.optim.SGD",
    "name=no_such_package.Lion": "optimizer.name: there is no package no_such_package here",
    "name=lions": "optimizer.name: 'lions' is not one of adamw, .*did you mean lion",
    "betas=[0.9]": r"optimizer.betas: must have more items, not \[0.9\]",
    "betas=0.9": "optimizer.betas: must be a list, not 0.9",
    "arguments={lr: 1.0}": "optimizer.arguments: lr has a key of its own: set .*learning_rate",
    "arguments={betas: [0.5]}": "optimizer.arguments: betas has a key of its own",
    "arguments={a: {b: 1}}": "optimizer.arguments: must be a number, a text",
    "name=schedule_free,lr_scheduler=cosine": "lr_scheduler: cosine has no place with schedule_",
    "name=prodigy_schedule_free,learning_rate=1e-4": "optimizer.learning_rate: 0.0001 is a rate",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_what_an_optimizer_cannot_have_is_told(settings, installed, overrides):
    parts = re.split(r",(?=[a-z_]+=)", overrides)
    (line,) = refused(settings, *(f"optimizer.{part}" for part in parts))
    assert re.search(MISTAKES[overrides], line)


def test_an_average_beside_a_schedule_free_optimizer_is_refused(settings, installed):
    (line,) = refused(settings, "optimizer.name=schedule_free", "train.ema_decay=0.9")
    assert line == "train.ema_decay: schedule_free averages the weights itself: remove this"


def test_lion_has_the_averages_of_its_paper_unless_others_are_given():
    assert OptimizerConfig(name="lion").betas == (0.9, 0.99)
    assert OptimizerConfig(name="lion", betas=(0.5, 0.6)).betas == (0.5, 0.6)
