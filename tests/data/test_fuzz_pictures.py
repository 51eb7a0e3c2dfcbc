"""Pictures that are damaged at random are read right or refused by name.

`python tests/fuzz_pictures.py` tries hundreds.
"""

import os
import signal
import time

import pytest

from tests import fuzz_pictures
from tests.shared import fuzzing
from tests.shared.fuzzing import Case
from trainers.errors import UserError


def test_no_damaged_picture_is_taken_for_another_one(tmp_path):
    result = fuzzing.fuzz(fuzz_pictures.cases(tmp_path, 42, seed=1), 60)
    assert result.faults == {}
    assert min(result.counts["accepted"], result.counts["refused"]) > 5


def refuse(message):
    raise UserError(message)


FAULTS = {
    "a traceback": lambda folder: 1 / 0,
    "an unclear message": lambda folder: refuse(""),
    "a hang": lambda folder: time.sleep(60),
    "the process died": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    "a traceback: Traceback": lambda folder: os.system("true"),
    "other pixels": lambda folder: "other pixels",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    result = fuzzing.fuzz([Case("case", FAULTS[fault])], 10 if fault != "a hang" else 0.1)
    assert result.counts["fault"] == 1
    assert result.faults["0 case"].startswith(fault)
