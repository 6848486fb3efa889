"""The launcher's part in stopping a run: pass signals on, leave the ranks time to save, and tell a stop from a failure.

Starts and supervises nothing (`megatron.launch.spawn`). Invariant: whoever was asked to stop is gone when the time is
over.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Protocol

from megatron.common.stop import STOP_SIGNALS

# Where no configuration says how long ranks may take to leave.
EXIT_GRACE_MINS = 10.0
# A rank left although nobody asked here: time for the others to leave by themselves before they are asked too.
OWN_END_S = 1.0


class Signalled(Protocol):
    """What is asked of a rank. shares_group: the terminal's Ctrl-C reaches it without us."""

    shares_group: bool

    def send(self, number: int) -> None: ...


class Stopping:
    """A signal handler that asks every rank in `ranks` (as it grows) to stop, and what came of it.

    grace_mins: how long they may take to leave (exit_grace_in_mins).
    Ctrl-C when they were asked already ends them at once; other repetitions are passed on and change nothing.
    """

    def __init__(self, ranks: Sequence[Signalled], grace_mins: float) -> None:
        self._ranks, self._grace_mins = ranks, grace_mins
        self._asked = 0
        self._is_killing = False
        self._timers: list[threading.Timer] = []
        self.exit_code = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal of this process."""
        insists = number == signal.SIGINT and self._asked != 0
        for rank in self._ranks:
            if insists or not (number == signal.SIGINT and rank.shares_group):
                rank.send(signal.SIGKILL if insists else number)
        if insists:
            self._is_killing = True
            self.exit_code = 128 + signal.SIGINT
        elif number in STOP_SIGNALS and not self._asked:
            self._begin(number)

    def is_stop(self, returncode: int) -> bool:
        """Whether a rank that ended so (-n: by signal n) was asked to, and did not fail. The others then stop too."""
        if self._is_killing and returncode == -signal.SIGKILL:
            self.exit_code = self.exit_code or 128 + self._asked
            return True
        number = -returncode if returncode < 0 else returncode - 128
        if number not in STOP_SIGNALS:
            return False
        if not self._is_killing:
            self.exit_code = self.exit_code or 128 + number
        if not self._asked:
            self._begin(number)
            self._after(OWN_END_S, self._send, number)
        return True

    def close(self) -> None:
        """All ranks are gone."""
        for timer in self._timers:
            timer.cancel()

    def _begin(self, number: int) -> None:
        self._asked = number
        self._after(60 * self._grace_mins, self._kill)

    def _after(self, delay_s: float, what: Callable[..., None], *args: int) -> None:
        timer = threading.Timer(delay_s, what, args)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _send(self, number: int) -> None:
        for rank in self._ranks:
            rank.send(number)

    def _kill(self) -> None:
        sys.stderr.write(
            f"{signal.Signals(self._asked).name} was {self._grace_mins:g} minutes ago (exit_grace_in_mins) and the "
            "run has not left: it is ended now. The last checkpoint is untouched; what came after it is lost.\n"
        )
        self._is_killing = True
        self._send(signal.SIGKILL)
