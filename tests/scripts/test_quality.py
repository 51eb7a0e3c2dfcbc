"""A recipe is good from the first of several probes on that all pass, and not before."""

import importlib
import json
from argparse import Namespace

import pytest

from small_world.gate import LEVELS
from small_world.probe import IN_A_ROW, Streaks, passes
from tests.shared.processes import ROOT

GOOD = {name: max(low, min(high, 0.9)) for name, (low, high) in LEVELS["whole"].items()}
FORGETS = GOOD | {"other_colour": 0.5}
LEAKS = {name: GOOD[name] for name in LEVELS["learnt"]} | {"leak": 0.5}


def after(*probes):
    streaks = Streaks()
    for i, metrics in enumerate(probes, 1):
        streaks.add(metrics, {"step": i})
    return {name: when["step"] for name, when in streaks.good.items()}


def test_what_was_not_measured_has_not_passed():
    assert passes(GOOD, LEVELS["whole"])
    for name in GOOD:
        lacking = {other: value for other, value in GOOD.items() if other != name}
        assert not passes(lacking, LEVELS["whole"])


def test_a_streak_counts_from_its_first_probe_once_it_is_confirmed():
    assert after(*[GOOD] * (IN_A_ROW - 1)) == {}
    assert after(*[GOOD] * IN_A_ROW) == dict.fromkeys(LEVELS, 1)
    assert after(GOOD, {}, *[GOOD] * IN_A_ROW) == dict.fromkeys(LEVELS, 3)


def test_each_level_has_a_streak_of_its_own():
    learnt = [LEAKS] * IN_A_ROW
    assert after(*learnt) == {"learnt": 1}
    assert after(*learnt, *[FORGETS] * IN_A_ROW) == {"learnt": 1, "kept": IN_A_ROW + 1}
    broken = [GOOD, FORGETS, GOOD]
    assert after(*broken) == {"learnt": 1, "kept": 1}


def test_what_was_confirmed_stays():
    assert after(*[GOOD] * IN_A_ROW, {}, {}) == dict.fromkeys(LEVELS, 1)


@pytest.fixture
def quality(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(ROOT / "scripts/results")
    return importlib.import_module("quality")


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_each_recipe_is_a_config_and_its_class_pictures_are_drawn_once(quality, family, tmp_path):
    arguments = Namespace(out=tmp_path, steps=100, set=[])
    for recipe in quality.RECIPES.values():
        configs = [quality.make_config(family, recipe, seed, arguments) for seed in (1, 2)]
        assert [config.seed for config in configs] == [1, 2]
        one, other = (config.model_dump(exclude={"seed"}) for config in configs)
        assert one == other
        drawn = configs[0].data.class_sets
        assert all(photos.class_data_dir == tmp_path / "class" / family for photos, _ in drawn)


def test_a_run_that_has_ended_is_found_by_its_settings(quality, tmp_path):
    log, run = tmp_path / "log", {"recipe": "a", "seed": 1, "settings": ["x"]}
    assert quality.find_end(log, run) is None
    ended = [{**run, "step": 5}, {**run, "seed": 2, "end": 5}, {**run, "settings": [], "end": 5}]
    log.write_text("".join(json.dumps(line) + "\n" for line in ended))
    assert quality.find_end(log, run) is None
    with log.open("a") as file:
        file.write(json.dumps({**run, "end": 7}) + "\n")
    assert quality.find_end(log, run)["end"] == 7
