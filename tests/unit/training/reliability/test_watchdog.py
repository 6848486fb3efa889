"""The watchdog on one rank: whom it names, when it fires, and what it forgives."""

from __future__ import annotations

import io
import threading

import pytest

from megatron.common import heartbeat
from megatron.training.reliability.watchdog import Status, Watchdog, missing


def statuses(*rows: tuple[int, bool]) -> dict[int, Status]:
    return {
        rank: Status(rank, "host", place=f"place {places}", num_places=places, waits=waits)
        for rank, (places, waits) in enumerate(rows)
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(3, True), (2, True), (3, True)], "rank 1 (on host) has not come further than 'place 2'; the others wait"),
        ([(1, False), (1, True), (3, True)], "ranks 0 (on host), 1 (on host) have not come further than 'place 1'"),
        ([(3, True), (3, True), (3, False)], "rank 2 (on host) is not in a collective operation"),
        ([(3, True), (3, True), (3, True)], "all 3 ranks are at the same place"),
        ([(3, False), (3, False), (3, False)], "all 3 ranks are at the same place"),
    ],
)
def test_who_is_missing(rows: list[tuple[int, bool]], expected: str) -> None:
    known = statuses(*rows)
    assert missing(known, known, len(rows)).startswith(expected)


def test_who_does_not_answer_is_missing_first() -> None:
    known = statuses((3, True), (1, False), (3, True))
    answering = {0: known[0], 2: known[2]}
    assert missing(answering, known, 4).startswith("ranks 1 (on host), 3 do not answer, last seen at 'place 1'")


def test_a_single_process_is_ended_too() -> None:
    codes: list[int] = []
    ended = threading.Event()
    stream = io.StringIO()
    # The interpreter's own timer writes to a file only; here it is not to come to that.
    watchdog = Watchdog(0.3, 0, 1, stream=stream, end=lambda code: (codes.append(code), ended.set()))
    watchdog._arm = lambda: None  # type: ignore[method-assign]
    heartbeat.reach("a test")
    watchdog.start()
    assert ended.wait(20)
    assert codes == [7]
    assert heartbeat.ending.is_set()
    heartbeat.ending.clear()
    assert "no rank has made progress for 0.3 s (watchdog_timeout_s): there is no other" in stream.getvalue()
    assert "test_a_single_process_is_ended_too" in stream.getvalue()


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    watchdog = Watchdog(10.0, 0, 1, stream=io.StringIO())
    heartbeat.beat()
    now = heartbeat.last().at
    watchdog._note_look(now + 0.5)
    watchdog._update(now + 0.5)
    assert watchdog._own.age_s == pytest.approx(0.5)
    # The next look comes 100 s later.
    watchdog._note_look(now + 100.5)
    watchdog._update(now + 100.5)
    assert watchdog._own.age_s == pytest.approx(0.0)
