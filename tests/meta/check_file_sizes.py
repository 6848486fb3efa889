"""`python -m tests.meta.check_file_sizes [root]`: no file over 400 lines, no function over 80.

It says nothing about what a good size is; the median is printed for that. Exit code 1 if anything is too long.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.meta.source_tree import ROOT, python_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def too_long(path: Path, root: Path = ROOT) -> Iterator[str]:
    """A line for every limit that the file breaks."""
    text = path.read_text(encoding="utf-8")
    name, num_lines = path.relative_to(root), len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{name}: {num_lines} lines, the limit is {MAX_FILE_LINES}. Split it where it does two jobs."
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, the limit is {MAX_FUNCTION_LINES}."


def main() -> int:
    """Check the tree and print what is too long."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    files = python_files(root)
    problems = [problem for path in files for problem in too_long(path, root)]
    print("\n".join(problems), end="\n" if problems else "")
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in files if path.name != "__init__.py"]
    if sizes:
        print(f"{len(sizes)} Python files, median {statistics.median(sizes):.0f} lines, longest {max(sizes)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
