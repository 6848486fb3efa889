"""The requirements files agree with each other, with their README, and with what the code imports."""

from __future__ import annotations

import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.meta.source_tree import ROOT, imported_modules, python_files, shown

FOLDER = ROOT / "requirements"
FILES = sorted(FOLDER.glob("requirements*.txt"))
# Found at run time where they are installed, and never required.
DETECTED = {"flash_attn", "torchao", "triton"}
# Tools that are run, a viewer, type stubs, and what fsspec loads for an address.
NOT_IMPORTED = {
    "pytest-xdist",
    "pytest-timeout",
    "ruff",
    "mypy",
    "import-linter",
    "types-pyyaml",
    "tensorboard",
    "s3fs",
}


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Name -> version of the lines of a requirements file."""
    found = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", line)
        assert match, f"{path.name}: {line!r} is not an exact pin, name==version"
        found[canonical(match[1])] = match[2]
    return found


def direct() -> dict[str, str]:
    """All pins of all requirements files."""
    return {name: version for path in FILES for name, version in pins(path).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_pin_is_the_one_of_the_constraints(path: Path) -> None:
    constraints = pins(FOLDER / "constraints.txt")
    assert {name: constraints.get(name) for name in pins(path)} == pins(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_under_the_constraints(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "-c constraints.txt" in lines or "-r requirements.txt" in lines


def test_dev_brings_everything() -> None:
    lines = (FOLDER / "requirements-dev.txt").read_text().splitlines()
    others = {f"-r {path.name}" for path in FILES if path.name != "requirements-dev.txt"}
    assert others <= set(lines)


def test_the_readme_has_one_row_for_every_direct_dependency() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    names = [canonical(name) for name in rows if name != "package"]
    assert sorted(names) == sorted(direct())


def _third_party_imports() -> dict[str, list[str]]:
    own = {"megatron", "tests", "tools", "benchmarks", *(path.stem for path in ROOT.glob("*.py"))}
    found: dict[str, list[str]] = {}
    for path in python_files():
        for line, module in imported_modules(path):
            top = module.split(".")[0]
            if top not in own and top not in sys.stdlib_module_names and top not in DETECTED:
                found.setdefault(top, []).append(f"{shown(path)}:{line}")
    return found


def test_every_import_is_declared() -> None:
    distributions = packages_distributions()
    undeclared = {
        module: places[:3]
        for module, places in _third_party_imports().items()
        if not {canonical(name) for name in distributions.get(module, [module])} & set(direct())
    }
    assert undeclared == {}, "add them to a requirements file"


def test_every_declared_package_is_used() -> None:
    distributions = packages_distributions()
    used = {canonical(name) for module in _third_party_imports() for name in distributions.get(module, [module])}
    assert set(direct()) - used - NOT_IMPORTED == set(), "remove them"


def test_errors_name_requirements_files_that_exist() -> None:
    named = {
        name
        for path in python_files()
        for name in re.findall(r"requirements(?:-\w+)?\.txt", path.read_text())
        if path.is_relative_to(ROOT / "megatron")
    }
    assert named
    assert {name for name in named if not (FOLDER / name).exists()} == set()
