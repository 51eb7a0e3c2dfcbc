"""Every mutant of tests/mutants.yaml can be made, and the tests that should notice it exist."""

import ast

import pytest

from tests.mutants import read_mutants
from tests.shared.processes import ROOT


@pytest.mark.parametrize(
    "mutant", read_mutants(), ids=lambda mutant: f"{mutant.file} {mutant.name}"
)
def test_a_mutants_text_occurs_once_and_its_tests_exist(mutant):
    text = (ROOT / "trainers" / mutant.file).read_text("utf-8")
    assert text.count(mutant.old) == 1
    mutated = text.replace(mutant.old, mutant.new)
    assert mutated != text
    if mutant.file.endswith(".py"):
        ast.parse(mutated)
    assert all((ROOT / "tests" / test).is_file() for test in mutant.tests)
