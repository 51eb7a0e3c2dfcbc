"""Pictures that are damaged at random are read right or refused by name.

`python tests/fuzz_pictures.py` tries hundreds.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import fuzz_pictures
from tests.shared import fuzzing
from tests.shared.fuzzing import Case
from trainers.atomic import read_ordinary_file
from trainers.data.pictures import picture_from_file
from trainers.errors import UserError


def test_no_damaged_picture_is_taken_for_another_one(tmp_path):
    result = fuzzing.fuzz(fuzz_pictures.cases(tmp_path, 42, seed=1), 60)
    assert result.faults == {}
    assert min(result.counts["accepted"], result.counts["refused"]) > 5


@pytest.mark.skipif(not Path("/proc/kmsg").exists(), reason="this system has no such file")
@pytest.mark.parametrize("read", [picture_from_file, read_ordinary_file])
def test_a_file_whose_content_is_yet_to_come_is_not_waited_for(read):
    """To the system it is a file like any other, and empty."""

    def check(folder):
        try:
            picture = read(Path("/proc/kmsg"))
            return str(picture.decode())
        except OSError:
            return "refused"

    assert fuzzing.fuzz([Case("case", check)], 10).counts["refused"] == 1


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
