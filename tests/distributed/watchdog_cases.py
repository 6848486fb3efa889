"""Ranks that hang in several ways under a watchdog; run on every rank of a warm pool."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch.distributed as dist

from megatron.common.errors import run_main
from megatron.common.heartbeat import beat, reach
from megatron.training.reliability.watchdog import start_watchdog


def hang(timeout_s: float, rank: int, how: str) -> None:
    """All ranks come to step 2; `rank` does not come out of it.

    how: "before": it never reaches the place where the others wait; "beside": it reaches it and then does not take
    part; "stopped": SIGSTOP. The others wait in a collective.
    """
    run_main(lambda: _hang(timeout_s, rank, how))


def _hang(timeout_s: float, rank: int, how: str) -> None:
    start_watchdog(timeout_s)
    for step in range(2):
        reach(f"step {step}")
        dist.barrier()
    if dist.get_rank() == rank:
        if how == "stopped":
            # Long enough for the others to hear of step 1.
            threading.Event().wait(timeout_s / 4)
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "beside":
            reach("step 2")
        _the_line_that_hangs()
    reach("step 2")
    dist.barrier()


def _the_line_that_hangs() -> None:
    threading.Event().wait()


def work_long(timeout_s: float) -> float:
    """Rank 0 works for three timeouts and gives signs of life, while the others wait for it in a collective."""
    watchdog = start_watchdog(timeout_s)
    assert watchdog is not None
    started = time.monotonic()
    reach("building")
    if dist.get_rank() == 0:
        while time.monotonic() - started < 3 * timeout_s:
            threading.Event().wait(timeout_s / 8)
            beat()
    dist.barrier()
    watchdog.stop()
    sys.stderr.flush()
    return time.monotonic() - started
