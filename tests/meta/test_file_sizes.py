"""The size check finds what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.meta.check_file_sizes import too_long
from tests.meta.source_tree import ROOT, python_files


def test_the_project_keeps_the_limits() -> None:
    assert [problem for path in python_files() for problem in too_long(path)] == []


@pytest.mark.parametrize(("num_lines", "num_problems"), [(400, 0), (401, 1)], ids=["at the limit", "over the limit"])
def test_file_length(tmp_path: Path, num_lines: int, num_problems: int) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * num_lines)
    assert len(list(too_long(tmp_path / "a.py", tmp_path))) == num_problems


@pytest.mark.parametrize(("num_lines", "num_problems"), [(80, 0), (81, 1)], ids=["at the limit", "over the limit"])
def test_function_length(tmp_path: Path, num_lines: int, num_problems: int) -> None:
    body = "        x = 1\n" * (num_lines - 1)
    (tmp_path / "a.py").write_text(f"class A:\n    @property\n    def f(self):\n{body}")
    assert len(list(too_long(tmp_path / "a.py", tmp_path))) == num_problems


def test_the_check_sees_the_project() -> None:
    names = {str(path.relative_to(ROOT)) for path in python_files()}
    assert {"megatron/common/errors.py", "tests/conftest.py", "tools/plot_losses.py"} <= names
    assert not any(name.startswith((".venv", "data")) for name in names)
