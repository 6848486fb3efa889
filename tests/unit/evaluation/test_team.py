"""Rank 0 drives and the others serve."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.evaluation import cases

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize(("world_size", "count"), [(2, 11), (3, 25), (2, 1), (2, 0)])
def test_results_keep_the_order_and_the_work_is_shared(ranks: Ranks, world_size: int, count: int) -> None:
    (results, heard), *others = ranks(cases.map_squares, world_size, count)
    assert others == [None] * (world_size - 1)
    assert [square for square, _ in results] == [number * number for number in range(count)]
    per_rank = [sum(maker == rank for _, maker in results) for rank in range(world_size)]
    assert max(per_rank) - min(per_rank) <= 1
    assert heard == count


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_on_one_rank_ends_all(ranks: Ranks, rank: int) -> None:
    messages = [json.loads(message) for message in ranks(cases.fail_on, 2, rank, timeout=30)]
    assert messages[0] == messages[1]
    assert messages[0][0] == "MegatronError"
    assert f"rank {rank}: ArithmeticError: cannot do {rank}" in messages[0][1]


def test_problem_found_by_rank_0_is_raised_everywhere(ranks: Ranks) -> None:
    messages = [json.loads(message) for message in ranks(cases.fail_before_work, 2, timeout=30)]
    assert messages == [["DataError", "no such file"]] * 2


@pytest.mark.parametrize(("world_size", "rank", "tp_size"), [(1, 0, 1), (2, 0, 1), (2, 1, 1), (2, 0, 2), (2, 1, 2)])
def test_a_signal_to_one_rank_stops_all(ranks: Ranks, world_size: int, rank: int, tp_size: int) -> None:
    found = ranks(cases.stop_on, world_size, rank, int(signal.SIGTERM), tp_size, timeout=30)
    # Who was asked leaves before its next chunk, unless others compute with it; the others end their wave of four.
    expected = [(signal.SIGTERM, 3 if tp_size == 1 and it == rank else 4) for it in range(world_size)]
    assert found == expected
