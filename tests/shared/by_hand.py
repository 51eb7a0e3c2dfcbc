"""Which cases of a test are run each time, and which, of a kind with them, by hand."""

from collections.abc import Collection, Iterable

import pytest
from _pytest.mark.structures import ParameterSet

# a U-Net and a transformer
EACH_TIME = ("sdxl", "flux")


def by_hand_but(each_time: Collection[str], cases: Iterable[str]) -> list[ParameterSet]:
    """The cases as parameters; those not in `each_time` are marked slow.

    Raises: ValueError where one of `each_time` is no case.
    """
    found = list(cases)
    if unknown := set(each_time) - set(found):
        raise ValueError(f"no such cases: {sorted(unknown)}")
    return [
        pytest.param(case, id=case, marks=() if case in each_time else pytest.mark.slow)
        for case in found
    ]
