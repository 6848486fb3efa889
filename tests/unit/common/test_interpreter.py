"""Entry scripts under a Python without the requirements: the project's environment, or one clear line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta.source_tree import ROOT, python_files

COMMAND = """
import sys
import brought_by_the_environment

def main():
    print("ran", sys.argv[1:], sys.orig_argv[1])
    return 6
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one command, whose requirement this Python does not have."""
    shutil.copytree(ROOT / "megatron" / "common", tmp_path / "megatron" / "common")
    shutil.copy(ROOT / "megatron" / "__init__.py", tmp_path / "megatron")
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "megatron" / "cli").mkdir()
    (tmp_path / "megatron" / "cli" / "__init__.py").touch()
    (tmp_path / "megatron" / "cli" / "train.py").write_text(COMMAND)
    return tmp_path


def make_environment(checkout: Path, *, is_complete: bool) -> Path:
    """What `make` leaves in .venv, in effect: a Python that finds more modules."""
    folder = checkout / "installed"
    folder.mkdir()
    if is_complete:
        (folder / "brought_by_the_environment.py").touch()
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def train(checkout: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "WORLD_SIZE", "PYTHONPATH", "PYTHONUNBUFFERED")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, *flags, str(checkout / "train.py"), "a b", "c"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_environment_of_make_takes_over(checkout: Path) -> None:
    python = make_environment(checkout, is_complete=True)
    result = train(checkout, "-u")
    assert result.returncode == 6
    assert result.stdout == "ran ['a b', 'c'] -u\n"
    assert result.stderr == f"note: {sys.executable} lacks brought_by_the_environment; using {python}\n"


def test_only_the_first_rank_says_so(checkout: Path) -> None:
    make_environment(checkout, is_complete=True)
    assert "note:" in train(checkout, RANK="0", WORLD_SIZE="2").stderr
    result = train(checkout, RANK="1", WORLD_SIZE="2")
    assert (result.returncode, result.stderr) == (6, "")


@pytest.mark.parametrize("has_environment", [True, False])
def test_without_a_complete_environment_one_line_says_what_to_do(checkout: Path, has_environment: bool) -> None:
    if has_environment:
        make_environment(checkout, is_complete=False)
    result = train(checkout)
    assert result.returncode == 3
    assert result.stdout == ""
    *notes, line = result.stderr.splitlines()
    assert len(notes) == has_environment
    assert line.startswith("error: this Python (")
    assert "lacks brought_by_the_environment. Run `make quickstart` once" in line
    assert line.endswith("`pip install -r requirements/requirements.txt`.")


def test_an_old_python_is_named(checkout: Path) -> None:
    file = checkout / "megatron" / "common" / "interpreter.py"
    file.write_text(file.read_text().replace("OLDEST = (3, 11)", "OLDEST = (9, 1)"))
    result = train(checkout)
    assert result.returncode == 3
    version = "{}.{}".format(*sys.version_info[:2])
    assert f"is version {version}, and 9.1 or newer is needed." in result.stderr


def test_a_module_of_ours_that_is_missing_is_a_defect(checkout: Path) -> None:
    make_environment(checkout, is_complete=True)
    (checkout / "megatron" / "cli" / "train.py").write_text("import megatron.nowhere\n")
    result = train(checkout)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_every_entry_script_starts_this_way() -> None:
    """Nothing that needs the requirements is imported before."""
    # The quickstart is started by make, with the environment it has made.
    scripts = [
        path
        for path in python_files()
        if (path.parent == ROOT or ROOT / "tools" in path.parents) and path.name not in ("__init__.py", "quickstart.py")
    ]
    assert len(scripts) >= 11
    for path in scripts:
        lines = path.read_text().splitlines()
        assert len(lines) < 30
        imports = [line for line in lines if line.startswith(("from ", "import "))]
        assert set(imports) <= {
            "import sys",
            "from pathlib import Path",
            "from megatron.common.interpreter import run_command",
        }
        assert f'    run_command("megatron.cli.{"evaluate" if path.stem == "eval" else path.stem}")' in lines
