"""What the documents tell people to run exists; the exit codes in the README are those of the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.common import errors
from tests.meta.source_tree import ROOT
from tools.quickstart import STEPS

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "docs" / "clusters.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "requirements" / "README.md",
]


def commands(path: Path) -> Iterator[str]:
    """The lines of the indented and the fenced blocks of a Markdown file that look like commands."""
    is_fenced = False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            command = line.strip().removeprefix("$ ").split("  #")[0].strip()
            if re.match(r"(\./|make |python |pip |srun |torchrun |[A-Z_]+=\S+ )", command):
                yield command


def missing(command: str) -> list[str]:
    """Targets, scripts and configuration files of a command that do not exist; names with `my` are the reader's own."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    absent = []
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        absent += [word for word in words[1:] if word not in targets]
    for word in words:
        is_ours = word.startswith(("./", "configs/", "tools/", "megatron/", "benchmarks/", "requirements/")) or (
            word.endswith(".py") and "/" not in word
        )
        if is_ours and "my" not in word and not (ROOT / word).exists():
            absent.append(word)
    return absent


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(path: Path) -> None:
    found = list(commands(path))
    assert found
    assert {command: absent for command in found if (absent := missing(command))} == {}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title.split(":")[0])
def test_commands_of_the_quickstart_exist(step: object) -> None:
    assert missing(step.command) == []  # type: ignore[attr-defined]


def test_the_check_finds_what_it_is_for() -> None:
    assert missing("make nonsense") == ["nonsense"]
    assert missing("./nothing.py train.py configs/none.yml configs/my.yml") == ["./nothing.py", "configs/none.yml"] or (
        missing("./nothing.py train.py configs/none.yml configs/my.yml")
        == ["./nothing.py", "train.py", "configs/none.yml"]
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_exit_codes_in_the_readme_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    codes = [value.exit_code for value in classes if value is not errors.MegatronError]
    assert len(set(codes)) == len(codes)
    assert set(codes) <= {int(row) for row in rows}
