"""Nothing in the repository depends on, or mentions, the machine that it was written on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.meta.source_tree import project_files, shown

# Put together from parts, so that this file does not mention them either.
_PLACES = "|".join(["wo" + "rk", "ro" + "ot", "opt/" + "pypi", "opt/" + "wheels", "tmp/" + "w", "mnt", "Users"])
_MENTION = re.compile(r"(?<![\w.$~/})])/(?:" + _PLACES + r")/|/home/(?!user\b|me\b|you\b)\w+|\bissues? sh" + r"ow\b")


def mentions(text: str) -> list[str]:
    """What in the text looks like a path or a tool of one particular machine."""
    return _MENTION.findall(text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_file_mentions_the_workplace() -> None:
    assert {shown(path): found for path in project_files() if (found := mentions(_text(path)))} == {}


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("cd /wo" + "rk/main", True),
        ("'/ro" + "ot/.cache'", True),
        ("/home/" + "alice/data", True),
        ("https://example.org/wo" + "rk/x", False),
        ("$HOME/wo" + "rk/x", False),
        ("net/wo" + "rk/x", False),
        ("/home/you/data", False),
        ("/data/my_run", False),
    ],
)
def test_the_pattern_finds_what_it_is_for(text: str, is_found: bool) -> None:
    assert bool(mentions(text)) == is_found
