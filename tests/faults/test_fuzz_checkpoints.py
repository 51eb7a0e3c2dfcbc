"""Stopped runs whose files are damaged at random end with the same weights, or are refused.

`python tests/fuzz_checkpoints.py` tries hundreds.
"""

from tests import fuzz_checkpoints
from tests.shared import fuzzing


def test_no_damaged_run_ends_with_other_weights(tmp_path):
    result = fuzzing.fuzz(fuzz_checkpoints.cases(tmp_path, 8, seed=1), 120)
    assert result.faults == {}
    assert result.counts["accepted"] > 2
