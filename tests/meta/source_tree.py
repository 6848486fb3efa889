"""The project's own files, for the tests that look at all of them.

Invariant: only what belongs to the repository is listed: no environment, no cache, no data, nothing that a run leaves.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("megatron", "tools", "tests", "benchmarks", "configs", "requirements", ".ci")


def project_files(root: Path = ROOT, folders: tuple[str, ...] = _FOLDERS) -> Iterator[Path]:
    """Files at the top and in the project's folders."""
    for top in root.iterdir():
        if top.is_file():
            # In a linked worktree .git is a file, not a folder.
            if top.name != ".git":
                yield top
        elif top.name in folders:
            yield from (path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def python_files(root: Path = ROOT) -> list[Path]:
    """Python files of the project, sorted."""
    return sorted(path for path in project_files(root) if path.suffix == ".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, wherever it stands in the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def shown(path: Path) -> str:
    """The path as a person would write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
