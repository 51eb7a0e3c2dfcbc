"""The script that trains two subjects of the small world at once runs, and its measure can fail."""

import json

import numpy as np
import pytest

from small_world.judge import load_judge
from small_world.two_subjects import make_prompts, read_marks, thing, verdict
from small_world.world import BACKGROUNDS, draw, plain_thing
from tests.shared.processes import ROOT, call

BOTH = ("star", "heart")


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def marks(judge, things):
    rng = np.random.default_rng(1)
    return read_marks(judge.read([draw(each, rng) for each in things])[0])


@pytest.mark.parametrize("shape", BOTH)
def test_the_judge_tells_each_subject_from_the_other_and_from_its_class(judge, shape):
    own = [thing(shape, background) for background in BACKGROUNDS] * 4
    other = [thing(name, b) for name in BOTH if name != shape for b in BACKGROUNDS] * 4
    name = {"star": "sks star", "heart": "zwx heart"}[shape]
    assert verdict(name, marks(judge, own), BOTH) == "learnt and apart"
    assert verdict(name, marks(judge, other), BOTH) == "FAILED"
    assert verdict(shape, marks(judge, own), BOTH) == "FAILED"
    rng = np.random.default_rng(0)
    plain = [thing_ for thing_ in (plain_thing(rng) for _ in range(300)) if thing_.shape == shape]
    assert verdict(shape, marks(judge, plain), BOTH) == "kept"
    assert verdict(name, marks(judge, plain), BOTH) == "FAILED"


def test_it_trains_and_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts/results")
    few = ("--seeds", 0, "--steps", 2, "--class-images", 1, "--samples", 1)
    assert call("results/two_subjects.py", *few, "--out", tmp_path) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0 |")]
    assert len(table) == len(make_prompts())
    figures = json.loads((tmp_path / "both-seed0/figures.json").read_text())
    assert figures.keys() == make_prompts().keys()
