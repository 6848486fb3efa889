"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C, as an exception at once or as a question that the work polls.

Knows no ranks and no torch; agreement between ranks is `megatron.training.reliability.signals`. Invariant: a signal is
never lost: it either raises `Stopped` or stays readable in `asked` until the process ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from megatron.common.errors import MegatronError, Stopped

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STARTED_AT = "MEGATRON_STARTED_AT"
_IMPORTED_AT = time.time()


def job_started_at() -> float:
    """When the job began, in seconds since 1970: as the launcher noted it, else when this process began."""
    return float(os.environ.get(STARTED_AT) or _IMPORTED_AT)


class StopSignals:
    """While entered, handles the stop signals of this process (of its main thread; elsewhere it does nothing).

    As it stands, a signal raises `Stopped` where the main thread is: temporary files go, nothing is half-written.
    Within `deferred` it is only noted, and the work polls `asked`; a second Ctrl-C raises all the same. Repeated
    SIGTERM and SIGUSR1 change nothing: `timeout` and Slurm send them twice, and cleaning up must not be cut short.
    """

    def __init__(self) -> None:
        self._number = 0
        self._notice: str | None = None
        self._is_leaving = False
        self._previous: dict[int, object] = {}

    def asked(self) -> int:
        """The signal that asked first, or 0."""
        return self._number

    @contextlib.contextmanager
    def deferred(self, notice: str) -> Iterator[None]:
        """Only note signals within the block. notice: what happens now, told once to whoever sent one."""
        outer, self._notice = self._notice, notice
        try:
            yield
        finally:
            self._notice = outer

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # What a parent lets its children ignore (`nohup`, a shell's background job) stays ignored.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if callable(handler) else signal.SIG_DFL)
        # Once a rank leaves, its peers' connections break: that is a consequence, and no news.
        if self._is_leaving and isinstance(error, Exception) and not isinstance(error, MegatronError):
            raise Stopped(self._number) from error

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first = not self._number
        self._number = self._number or number
        insists = number == signal.SIGINT and not is_first
        if self._notice is None or insists:
            if is_first or insists:
                self._is_leaving = True
                raise Stopped(number)
        elif is_first and os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{signal.Signals(number).name}: {self._notice}\n".encode())
