"""Rank 0 goes first, whatever becomes of it, and waits for nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.turn_cases import leave_before, take_turns

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize("fails", [False, True])
def test_rank_0_goes_first_every_time(ranks: Ranks, tmp_path: Path, fails: bool) -> None:
    found = ranks(take_turns, 3, str(tmp_path), 5, fails)
    assert found == [[False] * 5, [True] * 5, [True] * 5]


def test_nobody_waits_for_a_rank_that_has_left(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(leave_before, 2, str(tmp_path), timeout=20) == ["done", "left"]
