"""Configs that are broken at random are read or refused, and the fuzzer notices what it is for.

`python tests/fuzz_config.py` tries thousands.
"""

import pytest

from tests import fuzz_config
from trainers.config import loading
from trainers.errors import UserError


def test_no_broken_config_ends_in_a_traceback_or_is_taken(tmp_path):
    counts, faults = fuzz_config.fuzz(tmp_path, 200, seed=1)
    assert [(case.overrides, result) for case, result in faults] == []
    assert min(counts["accepted"], counts["refused"]) > 20


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        (lambda: 1 / 0, "a traceback"),
        (lambda: (_ for _ in ()).throw(UserError("")), "an unclear message"),
        (lambda: (_ for _ in ()).throw(UserError("x" * 5000)), "an unclear message"),
    ],
)
def test_a_fault_is_noticed(tmp_path, monkeypatch, action, fault):
    def load(path, overrides=()):
        next(iter(action()))

    monkeypatch.setattr(loading, "load_config", load)
    (case,) = fuzz_config.cases(tmp_path, 1, seed=0)
    assert fuzz_config.outcome(case, tmp_path).startswith(fault)


def test_a_hang_is_noticed(tmp_path, monkeypatch):
    def load(path, overrides=()):
        while True:
            pass

    monkeypatch.setattr(loading, "load_config", load)
    monkeypatch.setattr(fuzz_config, "SECONDS_PER_CASE", 0.05)
    counts, faults = fuzz_config.fuzz(tmp_path, 1, seed=0)
    assert (counts["fault"], faults[0][1]) == (1, "a hang")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "train_batch_size", 10**9),
        ("train", "max_grad_norm", -1.0),
        ("optimizer", "learning_rate", 1e300),
        ("optimizer", "betas", (0.9, float("nan"))),
        ("optimizer", "name", "unknown"),
        ("data", "instance_prompt", "a" * 20_000),
        ("validation", "prompts", ["a"] * 2000),
    ],
)
def test_a_value_outside_of_its_limits_is_noticed(settings, tmp_path, section, key, value):
    config = settings()
    assert fuzz_config.check_config(config, tmp_path) is None
    part = getattr(config, section).model_copy(update={key: value})
    wrong = config.model_copy(update={section: part})
    assert "outside" in fuzz_config.check_config(wrong, tmp_path)
