"""Errors of several ranks: the same text once, different texts all."""

from __future__ import annotations

import pytest

from megatron.launch.error_reports import ErrorReports, shown_ranks


def test_what_is_no_report_of_this_rank_is_left_alone() -> None:
    reports = ErrorReports(2)
    for line in ("error: a\n", "[rank 1] error: a\n", "[rank 1 on h] error: a\n", "x [rank 0 on h] a\n", ""):
        assert not reports.take(0, line)
    assert reports.show() == ""
    assert not reports.has(0)


def test_the_same_text_is_shown_once_with_its_ranks() -> None:
    reports = ErrorReports(4)
    for rank in (3, 0, 2):
        assert reports.take(rank, f"[rank {rank} on h] error: a\n")
        assert reports.take(rank, f"[rank {rank} on h] \n")
        assert reports.take(rank, f"[rank {rank} on h]   b of {rank == 0}\n")
    assert reports.show() == "[ranks 2-3 on h] error: a\n\n  b of False\n[rank 0 on h] error: a\n\n  b of True\n"
    assert reports.show() == ""
    assert reports.take(1, "[rank 1 on h] error: c\n")
    assert reports.show() == "[rank 1 on h] error: c\n"


def test_the_same_text_from_several_hosts_is_shown_once() -> None:
    reports = ErrorReports(7)
    reports.take(0, "[rank 0 on h] error: a\n")
    reports.take(1, "[rank 1 on k] error: a\n")
    assert reports.show() == "[ranks 0-1 on h, k] error: a\n"
    for rank in range(2, 7):
        reports.take(rank, f"[rank {rank} on h{rank}] error: b\n")
    assert reports.show() == "[ranks 2-6 on 5 hosts] error: b\n"


def test_the_culprits_words_come_last_even_if_they_were_shown_before() -> None:
    reports = ErrorReports(3)
    reports.take(1, "[rank 1 on h] error: disk\n")
    assert reports.first_rank == 1
    reports.take(0, "[rank 0 on h] error: peer\n")
    assert reports.show(last=1) == "[rank 0 on h] error: peer\n[rank 1 on h] error: disk\n"
    assert reports.show(last=1) == ""
    reports.take(2, "[rank 2 on h] error: peer 2\n")
    assert reports.show(last=1) == "[rank 2 on h] error: peer 2\n[rank 1 on h] error: disk\n"


def test_the_first_line_is_announced_once() -> None:
    calls: list[int] = []
    reports = ErrorReports(2, on_first=lambda: calls.append(1))
    for rank in (0, 1):
        reports.take(rank, f"[rank {rank} on h] a\n")
    assert calls == [1]


@pytest.mark.parametrize(
    ("ranks", "text"), [([4], "4"), ([1, 0], "0-1"), ([5, 0, 2, 3, 4], "0, 2-5"), ([0, 2, 4], "0, 2, 4")]
)
def test_ranks(ranks: list[int], text: str) -> None:
    assert shown_ranks(ranks) == text
