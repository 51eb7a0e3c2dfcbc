"""All that the code uses of torch was found in the sources of the oldest supported torch."""

import ast
import re

from tests.torch_api import ROOT, TABLE, Sources, collect, read_table, uses_of_torch

OLDER = """
from math import pi
from torch.sized import size_of as size

class Base:
    def __init__(self, device=None): ...

class Stream(Base):
    def record(self): ...

draw = make("draw(n, *, seed=None)")
"""
NEWER = """
import torch
from torch import draw, size as size_of
from torch import nn
import torch.sized as s

torch.pi, torch.Stream.record, torch.Stream.query
size_of(1, dim=2, unit="byte")
draw(3, seed=4, generator=None)
s.weigh(1)
nn.Linear(1, 2)
"""


def test_the_oldest_torch_has_all_that_is_used():
    """Where this fails: python tests/torch_api.py FOLDER, with that torch's wheel unpacked."""
    found = read_table()
    lacking = {
        name: keywords - found.get(name, set()) for name, keywords in uses_of_torch().items()
    }
    assert not [name for name, keywords in lacking.items() if keywords or name not in found]


def test_the_table_is_of_the_floor_in_pyproject():
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"torch {floor}." in TABLE.read_text().splitlines()[0]


def test_what_an_older_torch_lacks_is_told(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(OLDER)
    (tmp_path / "torch/sized.py").write_text("def size_of(x, dim=0): ...")
    sources, uses = Sources(tmp_path), {}
    collect(ast.parse(NEWER), uses)
    missing = {name for name in uses if not sources.find(name)}
    assert missing == {"torch.Stream.query", "torch.sized.weigh", "torch.nn", "torch.nn.Linear"}
    lacking = {name: sources.lacks(name, words) for name, words in uses.items()}
    assert lacking["torch.size"] == {"unit"}
    assert lacking["torch.draw"] == {"generator"}
