"""The agreement to stop, on one rank with a clock of its own, and on several."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from megatron.common.errors import Stopped
from megatron.common.stop import STARTED_AT
from megatron.training.reliability.signals import StopRequest


def test_the_clock_counts_from_the_beginning_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setenv(STARTED_AT, "1000")
    stop = StopRequest(limit_mins=2.5, clock=lambda: now)
    now = 1149.9
    assert not stop.agreed()
    now = 1150.0
    assert stop.agreed()
    assert (stop.exit_code, stop.reason) == (0, "exit_duration_in_mins = 2.5 is over")


def test_a_signal_goes_before_the_clock() -> None:
    stop = StopRequest(lambda: signal.SIGUSR1, limit_mins=1, started_at=0, clock=lambda: 1e9)
    assert stop.asked_here() == signal.SIGUSR1
    assert stop.agreed()
    assert (stop.exit_code, stop.reason) == (138, "SIGUSR1")


def test_without_signal_and_limit_it_never_stops() -> None:
    assert not StopRequest(clock=lambda: 1e18).agreed()


def test_ranks_that_know_different_reasons_agree_on_one(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(ask_around, 3) == [(False, 143, "SIGTERM", True)] * 3


def ask_around() -> tuple[bool, int, str, bool]:
    number = 0
    rank = dist.get_rank()
    stop = StopRequest(lambda: number, limit_mins=1, started_at=0, clock=lambda: 1e9 if rank == 2 and number else 0)
    before = stop.agreed()
    number = {0: 0, 1: signal.SIGTERM, 2: signal.SIGINT}[rank]
    assert stop.agreed()
    number = 0
    return before, stop.exit_code, stop.reason, stop.agreed()


def test_who_is_asked_while_others_have_left_leaves_too(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(ask_alone, 2) == ["left", "stopped by SIGTERM"]


def ask_alone() -> str:
    stop = StopRequest(lambda: signal.SIGTERM)
    dist.barrier()
    if dist.get_rank() == 0:
        dist.destroy_process_group()
        return "left"
    try:
        stop.agreed_at_start()
    except Stopped as stopped:
        return str(stopped)
    return "agreed"
