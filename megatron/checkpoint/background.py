"""One save at a time on a thread of its own.

It does not know what a save does. What the thread has to say is handed over at `poll`, so that only the training
thread ever prints. Invariant: all ranks see a save end at the same `poll`, because they agree on it there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.checkpoint.save import Saved
from megatron.common.errors import CheckpointError
from megatron.common.heartbeat import helped


@dataclass(frozen=True)
class Outcome:
    """How a background save of `step` ended: `saved`, or `error` after the last attempt. seconds: of all attempts."""

    step: int
    seconds: float
    saved: Saved | None
    error: Exception | None


class BackgroundSaver:
    """Runs `work`, and again after each of `pauses_s` seconds if it fails with a CheckpointError.

    Parallel: `start`, `poll` and `wait` are called by all ranks at the same points. `agree` is the training thread's;
    `work` must use other means to agree, as it runs at the same time.
    """

    def __init__(self, agree: Callable[[bool], bool], pauses_s: Sequence[float] = (1.0, 15.0)) -> None:
        self._agree, self._pauses_s = agree, pauses_s
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._notes: deque[str] = deque()
        self._hurry = threading.Event()
        self.step: int | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save was begun whose end `poll` or `wait` has not told yet. The same on all ranks."""
        return self._thread is not None

    def start(self, step: int, work: Callable[[], Saved]) -> None:
        """Begin. The one before must have been waited for."""
        assert self._thread is None, "at most one save is in flight"
        self.step, self._outcome = step, None
        self._hurry.clear()
        self._thread = threading.Thread(target=self._run, args=(step, work), name=f"save of step {step}", daemon=True)
        self._thread.start()

    def notes(self) -> list[str]:
        """What went wrong since the last call, though it is tried again."""
        found = []
        while self._notes:
            found.append(self._notes.popleft())
        return found

    def poll(self) -> Outcome | None:
        """How the save ended, once it has on all ranks. Collective while a save is in flight, else nothing happens."""
        if self._thread is None or not self._agree(self._outcome is not None):
            return None
        return self.wait()

    def wait(self) -> Outcome | None:
        """Wait for the end of the save in flight (pauses between attempts are cut short); None if there is none."""
        if self._thread is None:
            return None
        self._hurry.set()
        with helped():
            self._thread.join()
        self._thread = None
        return self._outcome

    def _run(self, step: int, work: Callable[[], Saved]) -> None:
        started = time.perf_counter()
        saved: Saved | None = None
        problem: Exception | None = None
        for pause_s in (*self._pauses_s, None):
            before, problem = str(problem), None
            try:
                saved = work()
                break
            except CheckpointError as error:
                problem = error
                if pause_s is not None:
                    told = f"step {step} failed to be saved again, as before." if str(error) == before else str(error)
                    self._notes.append(f"{told} It is tried again in the background.")
                    self._hurry.wait(pause_s)
            except Exception as error:  # the other ranks are gone, or a defect: nothing that a second attempt mends
                problem = error
                break
        self._outcome = Outcome(step, time.perf_counter() - started, saved, problem)
