"""LoRA files that are damaged at random are read right or refused.

`python tests/fuzz_lora.py` tries hundreds.
"""

from tests import fuzz_lora
from tests.shared import fuzzing


def test_no_damaged_lora_is_taken_for_another_one(tmp_path):
    result = fuzzing.fuzz(fuzz_lora.cases(tmp_path, 33, seed=1), 60)
    assert result.faults == {}
    assert min(result.counts["accepted"], result.counts["refused"]) > 2
