"""Whether a run is to stop before its end: asked by a signal to any rank or by the clock, and agreed by all of them.

Not here: what is done then (megatron.training.loop), and how a signal arrives (megatron.common.stop). Invariant: all
ranks get the same answer at the same place of the run, and once it is yes it stays yes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron.common.errors import Stopped
from megatron.common.stop import job_started_at

# Where several reasons meet, the largest is told; SIGHUP (1), which is no stop signal, gives its number to the clock.
_TIME_IS_UP = 1


class StopRequest:
    """Polled by the loop with `agreed`, and by work within a step of the loop with `asked_here`.

    asked: the signal that this process got, or 0. limit_mins: minutes since the job began, None for no limit.
    Parallel: made and asked by all ranks alike. The exchange of one number goes over the CPU, so that no device waits.
    """

    def __init__(
        self,
        asked: Callable[[], int] = lambda: 0,
        *,
        limit_mins: float | None = None,
        started_at: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._asked, self._clock, self._limit_mins = asked, clock, limit_mins
        begun = job_started_at() if started_at is None else started_at
        self._deadline = None if limit_mins is None else begun + 60 * limit_mins
        self._decided = 0
        self._is_shared = dist.is_initialized() and dist.get_world_size() > 1
        self._group: dist.ProcessGroup | None = None
        if self._is_shared and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def asked_here(self) -> int:
        """The reason that this rank knows of, or 0: not agreed, and not collective."""
        if not self._decided and self._deadline is not None and self._clock() >= self._deadline:
            return self._asked() or _TIME_IS_UP
        return self._decided or self._asked()

    def agreed(self) -> bool:
        """Whether the run is to stop here. Collective."""
        if not self._decided:
            self._decided = self.asked_here()
            if self._is_shared:
                reason = torch.tensor(self._decided, dtype=torch.int32)
                dist.all_reduce(reason, op=dist.ReduceOp.MAX, group=self._group)
                self._decided = int(reason)
        return self._decided != 0

    def agreed_at_start(self) -> bool:
        """`agreed`, where other ranks may have left on their own: a signal during start-up ends each rank at once.

        Raises: Stopped if this rank was asked as well and they are gone.
        """
        try:
            return self.agreed()
        except RuntimeError as error:
            if self._asked():
                raise Stopped(self._asked()) from error
            raise

    @property
    def reason(self) -> str:
        """What to tell about an agreed stop."""
        if self._decided == _TIME_IS_UP:
            return f"exit_duration_in_mins = {self._limit_mins:g} is over"
        return signal.Signals(self._decided).name

    @property
    def exit_code(self) -> int:
        """Of an agreed stop: 128 + n for signal n; 0 when the time was over, as for exit_interval."""
        return 0 if self._decided == _TIME_IS_UP else 128 + self._decided
