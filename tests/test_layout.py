"""Test files stand alone: none imports another, and each has its line in tests/README.md."""

import ast

from tests.shared.processes import ROOT

TESTS = ROOT / "tests"
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))
TEST_FILES = [name for name in FILES if name.rpartition("/")[2].startswith("test_")]


def imported_modules(name):
    for node in ast.walk(ast.parse((TESTS / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_file_or_conftest_is_imported():
    modules = {name.rpartition("/")[2].removesuffix(".py") for name in TEST_FILES} | {"conftest"}
    found = {name: set(".".join(imported_modules(name)).split(".")) & modules for name in FILES}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_readme_has_a_line_for_every_test_file():
    readme = (TESTS / "README.md").read_text("utf-8")
    assert [name for name in TEST_FILES if f"| {name} |" not in readme] == []
