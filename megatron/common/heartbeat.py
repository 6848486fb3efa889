"""Signs of life of this process, noted wherever long work goes on and read by the hang watchdog.

Noting one costs well under a microsecond and does nothing else, so that any layer may do it, watchdog or not.
Invariant: the number of places reached is comparable between ranks; the time of the last sign is this process's own.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass
class Heartbeat:
    """at: of the last sign, on the monotonic clock. place: the last one reached; num_places: how many have been."""

    at: float
    place: str = "start-up"
    num_places: int = 0


_here = Heartbeat(time.monotonic())

# Set when the watchdog is about to end this process: what fails from then on, as other ranks leave, is not the cause.
ending = threading.Event()


def beat() -> None:
    """Work goes on. For loops whose length differs between ranks: files, pieces, requests, micro-batches."""
    _here.at = time.monotonic()


def reach(place: str) -> None:
    """A place in the run that every rank comes to, in the same order: whoever has not is the one that is missing."""
    _here.place = place
    _here.num_places += 1
    _here.at = time.monotonic()


def last() -> Heartbeat:
    """A copy of the last sign."""
    return Heartbeat(_here.at, _here.place, _here.num_places)
