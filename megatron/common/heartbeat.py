"""Signs of life of this process's main thread, noted wherever long work goes on and read by the hang watchdog.

Noting one costs under a microsecond and does nothing else, so that any layer may do it, watchdog or not. Work on
another thread is no sign of life: a save in the background says nothing about the training that it runs beside. It
counts only while the main thread says that it waits for it (`helped`).
Invariant: the number of places reached is comparable between ranks; the time of the last sign is this process's own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

# Processor time between two looks that counts as work: a thread that waits for ever uses none.
_WORK_S = 1e-4


@dataclass
class Heartbeat:
    """at: of the last sign, on the monotonic clock. place: the last one reached; num_places: how many have been."""

    at: float
    place: str = "start-up"
    num_places: int = 0


@dataclass
class _Busy:
    """A long call of the main thread. clock: of its processor time; used_s: what that showed at the last look."""

    clock: int
    used_s: float


_here = Heartbeat(time.monotonic())
_helper_at = 0.0
_num_helped = 0
_busy: _Busy | None = None

# Set when the watchdog is about to end this process: what fails from then on, as other ranks leave, is not the cause.
ending = threading.Event()


def beat() -> None:
    """Work goes on. For loops whose length differs between ranks: files, pieces, requests, micro-batches."""
    global _helper_at
    if threading.current_thread() is threading.main_thread():
        _here.at = time.monotonic()
    else:
        _helper_at = time.monotonic()


def reach(place: str) -> None:
    """A place in the run that every rank comes to, in the same order: whoever has not is the one that is missing."""
    _here.place = place
    _here.num_places += 1
    _here.at = time.monotonic()


@contextlib.contextmanager
def helped() -> Iterator[None]:
    """The main thread does nothing but wait for another thread of this process, whose signs of life are now its own."""
    global _num_helped
    beat()
    _num_helped += 1
    try:
        yield
    finally:
        _num_helped -= 1
        beat()


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """One call that may take very long and cannot say so: as long as it uses the processor, it goes on.

    Not around anything that waits for other ranks: such a wait may spin. Ignored outside the main thread.
    """
    global _busy
    thread = threading.current_thread()
    if thread is not threading.main_thread() or thread.ident is None or _busy is not None:
        yield
        return
    clock = time.pthread_getcpuclockid(thread.ident)
    _busy = _Busy(clock, time.clock_gettime(clock))
    beat()
    try:
        yield
    finally:
        _busy = None
        beat()


def last() -> Heartbeat:
    """A copy of the last sign."""
    now_busy = _busy
    if now_busy is not None:
        used_s = time.clock_gettime(now_busy.clock)
        if used_s - now_busy.used_s >= _WORK_S:
            now_busy.used_s = used_s
            _here.at = time.monotonic()
    at = max(_here.at, _helper_at) if _num_helped else _here.at
    return Heartbeat(at, _here.place, _here.num_places)
