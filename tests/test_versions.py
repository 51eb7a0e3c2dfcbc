"""The oldest versions that pyproject.toml allows are those that the tests can be run on."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.shared.processes import ROOT

REQUIREMENT = re.compile(r'^\s+"([^"]+)",$', re.MULTILINE)


def pins(name):
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def floors():
    text = (ROOT / "pyproject.toml").read_text("utf-8").split("dependencies = [")[1].split("]")[0]
    requirements = map(Requirement, REQUIREMENT.findall(text))
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


OLDEST, NEWEST, FLOORS = pins("constraints-oldest.txt"), pins("constraints.txt"), floors()


# one is a part of newer Pythons, the other has no older build at hand
@pytest.mark.parametrize("name", sorted(FLOORS.keys() - {"tomli", "torch"}))
def test_a_floor_is_the_version_of_the_oldest_environment(name):
    assert Version(FLOORS[name]) == OLDEST[name]


@pytest.mark.parametrize("name", sorted(OLDEST.keys() & NEWEST.keys()))
def test_the_oldest_is_no_newer_than_the_usual_one(name):
    assert OLDEST[name] <= NEWEST[name]
