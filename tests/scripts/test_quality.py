"""A recipe is good from the first of several probes on that all pass, and not before."""

from small_world.gate import LEVELS
from small_world.probe import IN_A_ROW, Streaks, passes

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
