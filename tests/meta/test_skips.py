"""No test is skipped, or expected to fail, without a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.meta.source_tree import ROOT, python_files, shown

MARKS = ("skip", "skipif", "xfail")


def unexplained(path: Path) -> Iterator[int]:
    """Lines with a skip or xfail, as a mark or a call, that gives no reason."""
    tree = ast.parse(path.read_text())
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in MARKS and _is_pytest(node.value)):
            continue
        call = called.get(id(node))
        if call is None or not _has_reason(call, node.attr):
            yield node.lineno


def _is_pytest(node: ast.expr) -> bool:
    name = ast.unparse(node)
    return name in ("pytest", "pytest.mark")


def _has_reason(call: ast.Call, mark: str) -> bool:
    reasons = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
    if mark in ("skip", "xfail") and not reasons:
        reasons = call.args[:1]
    return any(not (isinstance(value, ast.Constant) and not str(value.value).strip()) for value in reasons)


def test_every_skip_has_a_reason() -> None:
    files = [path for path in python_files() if path.is_relative_to(ROOT / "tests")]
    assert [f"{shown(path)}:{line}" for path in files for line in unexplained(path)] == []


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("@pytest.mark.skip\ndef test(): ...", True),
        ("@pytest.mark.skip()\ndef test(): ...", True),
        ("@pytest.mark.skipif(True)\ndef test(): ...", True),
        ("@pytest.mark.skipif(True, reason='')\ndef test(): ...", True),
        ("@pytest.mark.xfail\ndef test(): ...", True),
        ("def test():\n    pytest.skip()", True),
        ("pytestmark = pytest.mark.skipif(True, reason=REASON)", False),
        ("@pytest.mark.skip('no GPU on this machine')\ndef test(): ...", False),
        ("def test():\n    pytest.skip(f'needs {n} GPUs')", False),
    ],
)
def test_the_check_finds_what_it_is_for(tmp_path: Path, source: str, is_found: bool) -> None:
    path = tmp_path / "probe.py"
    path.write_text(source)
    assert bool(list(unexplained(path))) == is_found
