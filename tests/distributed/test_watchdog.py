"""A hang ends all ranks within the time, with their stacks and the name of the one that is missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.watchdog_cases import hang, work_long
from tests.pool import RankFailure

Ranks = Callable[..., list[Any]]
TIMEOUT_S = 2.0


@pytest.mark.parametrize(
    ("how", "rank", "told"),
    [
        ("before", 1, r"rank 1 \(on .*\) has not come further than 'step 1'; the others wait at 'step 2'"),
        ("beside", 0, r"rank 0 \(on .*\) is not in a collective operation, in which the others wait"),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_exit_7(ranks: Ranks, how: str, rank: int, told: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match=told) as caught:
        ranks(hang, 3, TIMEOUT_S, rank, how, timeout=60)
    # Generous: the machine may be shared. The pool's own patience is 60 s.
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert message.count("the process ended with exit code 7") == 3
    assert message.count("error: no rank has made progress for 2 s (watchdog_timeout_s)") == 1
    for number in range(3):
        assert f"[rank {number} on " in message
    # The stack of the one that hangs, and what the others wait in.
    assert "in _the_line_that_hangs" in message
    assert "in barrier" in message


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stopped_rank_is_named_by_the_others(ranks: Ranks, rank: int) -> None:
    named = rf"rank {rank} \(on .*\) does not answer, last seen at 'step 1'"
    if rank == 0:
        # The pool's store is a file under a lock. A rank stopped while it holds that lock would silence the store for
        # all: not seen happening, but the other words were seen once, on a loaded machine.
        named += "|the rendezvous store, which rank 0's process .* does not answer either"
    with pytest.raises(RankFailure, match=named) as caught:
        ranks(hang, 3, TIMEOUT_S, rank, "stopped", timeout=60)
    assert str(caught.value).count("the process ended with exit code 7") == 2
    assert str(caught.value).count("error: no rank has made progress") == 1


def test_long_work_with_signs_of_life_is_left_alone(ranks: Ranks) -> None:
    assert all(elapsed >= 3 * 0.6 for elapsed in ranks(work_long, 2, 0.6))
