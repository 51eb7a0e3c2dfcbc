"""What of torch the toolkit uses, and whether an older torch has it, by that one's own sources.

python tests/torch_api.py FOLDER

FOLDER is an unpacked wheel of torch, of any platform: its .py and .pyi files are read, and nothing
of it runs. Each function and keyword that it lacks is printed. The others are written to
tests/torch_api.txt, which tests/test_torch_api.py compares with the code. Methods of tensors and
modules are not seen, for nothing in a source says what is a tensor; nor is what a function does.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/torch_api.txt"
FOLDERS = ("trainers", "scripts")
# where the functions are described that torch has no Python for
STUBS = {
    "torch": ("torch._C._VariableFunctions", "torch._C"),
    "torch.nn.functional": ("torch._C._nn", "torch._C._VariableFunctions"),
    "torch.accelerator": ("torch._C",),
}
Uses = dict[str, set[str]]


def uses_of_torch() -> Uses:
    """The full name of each thing of torch in the toolkit's sources, and its calls' keywords."""
    uses: Uses = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            collect(ast.parse(path.read_text("utf-8")), uses)
    return uses


def collect(tree: ast.Module, uses: Uses) -> None:
    names = dict(imported_names(tree))
    for node in ast.walk(tree):
        if name := full_name(node, names):
            uses.setdefault(name, set())
        if isinstance(node, ast.Call) and (name := full_name(node.func, names)):
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            uses.setdefault(name, set()).update(keywords)


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names in a module that are torch's, with their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield (alias.asname, alias.name) if alias.asname else ("torch", "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    """`torch.nn.Linear` of the expression `nn.Linear`; None of what is not torch's."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


class Sources:
    """The modules of a package by their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.definitions = cache(self.read_definitions)

    def files(self, module: str) -> list[Path]:
        stem = self.folder / module.replace(".", "/")
        candidates = [stem / "__init__.py", stem / "__init__.pyi"]
        candidates += [stem.with_suffix(".py"), stem.with_suffix(".pyi")]
        return [path for path in candidates if path.is_file()]

    def read_definitions(self, module: str) -> dict[str, list[ast.AST | str]]:
        """What each name of a module is: statements, or the full names that it is imported from."""
        found: dict[str, list[ast.AST | str]] = {}
        for path in self.files(module):
            package = module if path.stem == "__init__" else module.rpartition(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                for name, value in defined(node, package):
                    found.setdefault(name, []).append(value)
        return found

    def find(self, name: str, seen: frozenset[str] = frozenset()) -> list[ast.AST]:
        """The statements that define a full name; none where there is no such name."""
        if name in seen:
            return []
        if files := self.files(name):
            return [ast.parse(files[0].read_text("utf-8"))]
        module, _, last = name.rpartition(".")
        found: list[ast.AST] = []
        if self.files(module):
            own = self.definitions(module)
            stubs = [f"{stub}.{last}" for stub in STUBS.get(module, ())]
            stars = [f"{star}.{last}" for star in own.get("*", ())]
            for value in [*own.get(last, ()), *stubs, *stars]:
                if isinstance(value, ast.AST):
                    found.append(value)
                elif value.startswith("torch"):
                    found += self.find(value, seen | {name})
                else:  # of another package
                    found.append(ast.Constant(value))
        elif module:
            for owner in self.find(module, seen | {name}):
                found += self.members(owner, last)
        return found

    def members(self, owner: ast.AST, name: str) -> list[ast.AST]:
        """What a class has under a name; of an instance, whose class is not told, the statement."""
        if not isinstance(owner, ast.ClassDef):
            return [owner]
        found = [value for node in owner.body for key, value in defined(node, "") if key == name]
        for base in owner.bases:
            found += self.find(f"{ast.unparse(base)}.{name}")
        return [value for value in found if isinstance(value, ast.AST)]

    def lacks(self, name: str, keywords: set[str]) -> set[str]:
        """The keywords that no definition of a function or class takes."""
        taken: set[str] = set()
        for node in self.find(name):
            for function in functions_of(node):
                arguments = function.args
                if arguments.kwarg:
                    return set()
                own = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                taken |= {argument.arg for argument in own}
            if isinstance(node, ast.Assign):  # a function of C, whose docstring has its arguments
                taken |= set(re.findall(r"\b(\w+)=", ast.unparse(node.value)))
        return keywords - taken


def defined(node: ast.AST, package: str) -> Iterator[tuple[str, ast.AST | str]]:
    """The names that a statement gives, with itself or the full name that it imports."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name, node
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = parents[: len(parents) + 1 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            full = module if alias.name == "*" else f"{module}.{alias.name}"
            yield alias.asname or alias.name, full
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0], alias.name


def functions_of(node: ast.AST) -> Iterator[ast.FunctionDef]:
    """The functions that a call of what is defined calls."""
    if isinstance(node, ast.FunctionDef):
        yield node
    for member in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(member, ast.FunctionDef) and member.name in ("__init__", "__new__"):
            yield member


def read_table() -> Uses:
    lines = [line.split() for line in TABLE.read_text("utf-8").splitlines()]
    return {words[0]: set(words[1:]) for words in lines if words and words[0] != "#"}


def main() -> int:
    folder = Path(sys.argv[1])
    sources = Sources(folder)
    (version,) = [
        value.value.value for value in sources.definitions("torch.version")["__version__"]
    ]
    lines, missing = (
        [f"# what the toolkit uses of torch, found in the sources of torch {version}"],
        [],
    )
    for name, keywords in sorted(uses_of_torch().items()):
        if not sources.find(name):
            missing.append(name)
            continue
        lacking = sources.lacks(name, keywords)
        missing += [f"{name}({keyword}=)" for keyword in sorted(lacking)]
        lines.append(" ".join([name, *sorted(keywords - lacking)]))
    for line in missing:
        print(f"not found: {line}")
    TABLE.write_text("\n".join(lines) + "\n")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
