"""Rules on imports beyond those that import-linter checks (its contracts stand in pyproject.toml)."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.source_tree import ROOT, imported_modules, parsed, project_files, python_files, shown

IN_ONE_FILE_ONLY = [
    "wandb",
    "tensorboardX",
    "tensorboard",
    "comet_ml",
    "transformers",
    "lm_eval",
    "flash_attn",
    "torchao",
    "matplotlib",
    "tiktoken",
    "sentencepiece",
    "zstandard",
    "ftfy",
    "rich",
]
PACKAGE = [path for path in python_files() if path.is_relative_to(ROOT / "megatron")]


@pytest.mark.parametrize("library", IN_ONE_FILE_ONLY)
def test_a_library_is_imported_in_one_file_at_most(library: str) -> None:
    users = {shown(path) for path in PACKAGE for _, module in imported_modules(path) if module.split(".")[0] == library}
    assert len(users) <= 1, f"{library} is imported in {sorted(users)}: import it in one file, and use that"


def test_no_relative_imports() -> None:
    found = [
        f"{shown(path)}:{node.lineno}"
        for path in python_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert found == []


def test_every_folder_with_python_is_a_package() -> None:
    folders = {path.parent for path in python_files() if path.parent != ROOT}
    missing = [shown(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert missing == [], "import-linter does not see a folder without __init__.py"


def test_a_package_below_megatron_says_what_it_is_for() -> None:
    silent = [shown(path) for path in PACKAGE if ast.get_docstring(parsed(path)) is None]
    assert silent == []


def test_the_map_names_every_package() -> None:
    text = (ROOT / "megatron" / "README.md").read_text()
    table = text.split("layer  package")[1].split("\n\n")[0]
    packages = {path.parent.name for path in (ROOT / "megatron").glob("*/__init__.py")}
    named = set(table.replace("|", " ").split())
    assert packages - named == set(), "megatron/README.md does not name them"


def test_no_module_is_named_after_nothing() -> None:
    """`utils`, `helpers` and the like say nothing about what is in them."""
    empty_names = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [shown(path) for path in PACKAGE if path.name in empty_names] == []


PLANTED = {
    "upwards": ("megatron/ops/__init__.py", "import megatron.cli\n", "only what stands below"),
    "config beyond its door": ("megatron/model/build.py", "import megatron.config\n", "configuration ends at"),
    "DeepSpeed elsewhere": ("megatron/training/plan.py", "import deepspeed\n", "Only engine and launch"),
    "torch in common": ("megatron/common/files.py", "def f():\n    import torch\n", "never import torch"),
    "a package outside the layers": ("megatron/newcomer/__init__.py", "", "newcomer"),
}


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED.values(), ids=list(PLANTED))
def test_import_linter_finds_what_it_is_for(tmp_path: Path, file: str, line: str, contract: str) -> None:
    shutil.copytree(ROOT / "megatron", tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / file
    target.parent.mkdir(exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + line)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert contract in done.stdout


def test_project_files_are_found() -> None:
    assert {"Makefile", "README.md", "LICENSE", "pyproject.toml"} <= {path.name for path in project_files()}
