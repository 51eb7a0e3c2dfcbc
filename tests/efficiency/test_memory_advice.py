"""What is recommended for a card fits by the plan, is the best that does, and is planned once."""

import json

import pytest
import torch

from trainers import memory_advice, memory_plan
from trainers.memory_advice import GIB, LEVELS, MARGIN, PlanCache, Planner, advise, best_fit
from trainers.memory_plan import MemoryPlan

OPTIONS = ("train.train_batch_size=1", "data.resolution=64")


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """A planner that all tests share, so that each plan is made once."""
    cache = PlanCache(tmp_path_factory.mktemp("plans") / "plans.json")
    return Planner(torch.float32, has_cpu_memory=True, cache=cache)


@pytest.fixture
def candidates(settings):
    """Every level of a tiny Flux.1."""
    return [
        (level, settings(*OPTIONS, *typed(level), family="flux"))
        for level in LEVELS
        if level.get("model.quantization") != "nf4"
    ]


def typed(level, **more):
    return [f"{key}={json.dumps(value)}" for key, value in {**level, **more}.items()]


@pytest.mark.parametrize(
    "level", [pytest.param(LEVELS[0], marks=pytest.mark.slow), LEVELS[3]], ids=str
)
def test_a_plan_from_the_cache_is_the_plan(planner, settings, level, monkeypatch):
    config = settings(*OPTIONS, *typed(level), family="flux")
    right = memory_plan.plan_memory(config, torch.float32, has_cpu_memory=True)
    assert planner.plan(config) == right
    # nothing is counted again
    again = Planner(torch.float32, True, PlanCache(planner.cache.path))
    monkeypatch.setattr(memory_plan, "plan_memory", None)
    monkeypatch.setattr(memory_plan, "saved_bytes", None)
    assert again.plan(config) == right


@pytest.mark.parametrize(
    "change",
    [
        "lora.rank=8",
        "data.resolution=32",
        "train.train_batch_size=2",
        "data.cache=false",
        "validation.prompts=[a]",
        "train.gradient_checkpointing=selective",
    ],
)
def test_what_a_plan_depends_on_is_planned_anew(planner, settings, change):
    plain = settings(*OPTIONS, family="flux")
    assert planner.facts(plain) != planner.facts(settings(*OPTIONS, change, family="flux"))
    other = Planner(torch.bfloat16, True, planner.cache)
    assert other.facts(plain) != planner.facts(plain)
    assert planner.facts(plain) == planner.facts(settings(*OPTIONS, "seed=3", family="flux"))


@pytest.mark.parametrize("content", [b"", b"[", b"null", b"[1]", b"\xff"])
def test_a_damaged_cache_costs_time_only(tmp_path, content):
    path = tmp_path / "plans.json"
    path.write_bytes(content)
    assert PlanCache(path).get("facts", lambda: 3) == 3
    assert PlanCache(path).get("facts", lambda: 4) == 3


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "file").touch()
    assert PlanCache(tmp_path / "file" / "plans.json").get("facts", lambda: 3) == 3


def test_the_best_level_that_fits_is_recommended(planner, candidates, monkeypatch):
    peaks = [planner.plan(config).peak_bytes for _, config in candidates]
    # cards on which nothing, something and everything fits
    gib = [size / (1 - MARGIN) / GIB for size in (min(peaks) * 0.5, *sorted(peaks), 1e12)]
    monkeypatch.setattr(memory_advice, "CARDS", gib)
    found = list(advise(planner, candidates).values())
    assert found[0] is None
    assert found[-1].level == candidates[0][0]
    assert found[-1].batch_size == 8
    for card, advice in zip(gib[1:], found[1:], strict=True):
        assert advice.peak <= card * GIB * (1 - MARGIN) * (1 + 1e-9)
        position = [level for level, _ in candidates].index(advice.level)
        assert all(peak > card * GIB * (1 - MARGIN) for peak in peaks[:position])


@pytest.mark.parametrize("index", [0, 2])
def test_the_extrapolated_peak_of_a_batch_is_the_planned_one(
    planner, candidates, settings, index, monkeypatch
):
    monkeypatch.setattr(memory_advice, "CARDS", [1e6])
    monkeypatch.setattr(memory_advice, "BATCHES", [4])
    level, config = candidates[index]
    ours = [candidates[0], (level, config)]
    fixed = memory_advice.fixed_bytes(planner, ours[0][1])
    plan = planner.plan(config)
    advice = best_fit(level, plan, plan.phases["train"] - fixed, 1e15)
    larger = settings(*OPTIONS[1:], *typed(level), "train.train_batch_size=4", family="flux")
    assert advice.peak == pytest.approx(planner.plan(larger).peak_bytes, rel=0.05)


def test_a_phase_that_a_batch_does_not_change_limits_too():
    plan = MemoryPlan({"encode": 100, "train": 10}, flops=1)
    assert best_fit({}, plan, 1, budget=99) is None
    assert best_fit({}, plan, 1, budget=100).batch_size == 8
    assert best_fit({}, plan, 50, budget=100).batch_size == 2
