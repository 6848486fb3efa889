"""What is saved at one layout or precision is bitwise what is loaded at another, and the run goes on from it.

The oracle of the tensors is what the saving ranks held, put together; of the losses, the run that was not interrupted;
of the order of samples, counting.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.resume_matrix import Outcome, full_ring, precision_ring, quick_ring, row, run_ring

Ranks = Callable[..., list[Any]]


def check(outcomes: list[Outcome]) -> None:
    assert outcomes
    assert [row(outcome) for outcome in outcomes if not outcome.is_good] == []


def test_layouts(ranks: Ranks, tmp_path: Path) -> None:
    check(list(run_ring(ranks, quick_ring(), tmp_path)))


def test_precisions(ranks: Ranks, tmp_path: Path) -> None:
    """Each is once the source and once the target; the other three changes are in the full test."""
    ring = precision_ring()[:3]
    assert len({one.precision for one in ring}) == 3
    check(list(run_ring(ranks, ring, tmp_path)))


@pytest.mark.full
def test_all_precisions(ranks: Ranks, tmp_path: Path) -> None:
    check(list(run_ring(ranks, precision_ring(), tmp_path)))


@pytest.mark.full
def test_all_layouts(ranks: Ranks, tmp_path: Path) -> None:
    ring = full_ring()
    assert len(ring) == 54
    check(list(run_ring(ranks, ring, tmp_path)))
