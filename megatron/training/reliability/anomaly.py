"""What to do about steps that are not finite, or whose loss or gradient norm leaps: skip, roll back, stop.

A state machine over numbers; it knows no tensors, no ranks and no files. Every rank runs one and gives it the same
numbers, so all of them decide alike. The optimizer never makes a step that it refuses (megatron.engine.step_guard).
Invariant: its decisions are a function of its options and of what was recorded, and `state` holds all of that which
still counts, so that a continued run decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["go_on", "skip", "roll_back", "stop"]


@dataclass(frozen=True)
class AnomalyOptions:
    """The anomaly_* keys. Units: window in steps; the factors are multiples of a running median, 0 looks at nothing.

    skips_in_a_row, skips_in_window: skipped steps that are borne; one more rolls back or stops. None: any number.
    rollbacks: borne without `window` good steps between them. skip_data: go on behind the samples of the bad steps.
    """

    skips_in_a_row: int = 10
    skips_in_window: int | None = 32
    window: int = 128
    loss_factor: float = 0.0
    grad_norm_factor: float = 0.0
    rollbacks: int = 1
    skip_data: bool = True


@dataclass(frozen=True)
class Decision:
    """What is to be done after a step. reason: what was wrong with it; empty if nothing, or nothing to speak of."""

    action: Action
    reason: str = ""


GO_ON = Decision("go_on")


class AnomalyPolicy:
    """Watches one run. `accepts` is asked within each step, `record` told behind it."""

    def __init__(self, options: AnomalyOptions | None = None) -> None:
        self.options = options or AnomalyOptions()
        # Of accepted steps only: what is refused must not become normal.
        self._losses: deque[float] = deque(maxlen=self.options.window)
        self._norms: deque[float] = deque(maxlen=self.options.window)
        self._bad_steps: deque[int] = deque()
        self._in_a_row = 0
        self._good_in_a_row = 0
        self.num_skipped = 0
        self.num_not_finite = 0
        self.rollbacks = 0
        # Without good steps in number between them; these are what anomaly_rollbacks limits.
        self.recent_rollbacks = 0

    @property
    def first_bad_step(self) -> int | None:
        """The first of the skipped steps that count at the moment."""
        return self._bad_steps[0] if self._bad_steps else None

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may make a step of this loss and gradient norm, both finite. Changes nothing."""
        return not self._leap(loss, grad_norm)

    def record(
        self, step: int, loss: float, grad_norm: float, *, is_skipped: bool, is_scale_lowered: bool = False
    ) -> Decision:
        """Take note of optimizer step `step` (from 1) and say what to do.

        is_scale_lowered: fp16 gradients overflowed and the loss scale gave way, which is how it finds its value: such
        a step is skipped, and counts for nothing else.
        """
        if is_scale_lowered:
            self.num_skipped += 1
            return GO_ON
        while self._bad_steps and self._bad_steps[0] <= step - self.options.window:
            self._bad_steps.popleft()
        if not is_skipped:
            self._note_good(loss, grad_norm)
            return GO_ON
        self.num_skipped += 1
        self._in_a_row += 1
        self._good_in_a_row = 0
        self._bad_steps.append(step)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.num_not_finite += 1
        reason = self._wrong_with(loss, grad_norm)
        too_many = self._too_many()
        if not too_many:
            return Decision("skip", reason)
        may_roll_back = self.recent_rollbacks < self.options.rollbacks
        return Decision("roll_back" if may_roll_back else "stop", f"{reason}; {too_many}")

    def rolled_back(self, state: Mapping[str, Any] | None) -> None:
        """The run goes on from a checkpoint; `state` is what the policy was when that was written, if it is known.

        The counters go on, the history of good steps is the checkpoint's.
        """
        counted = self.num_skipped, self.num_not_finite, self.rollbacks + 1, self.recent_rollbacks + 1
        self.restore(state or {})
        self.num_skipped, self.num_not_finite, self.rollbacks, self.recent_rollbacks = counted
        self._bad_steps.clear()
        self._in_a_row = self._good_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """JSON values for `restore`."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "bad_steps": list(self._bad_steps),
            "in_a_row": self._in_a_row,
            "good_in_a_row": self._good_in_a_row,
            "num_skipped": self.num_skipped,
            "num_not_finite": self.num_not_finite,
            "rollbacks": self.rollbacks,
            "recent_rollbacks": self.recent_rollbacks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` described; an empty one (a checkpoint of an older version) is a new run's."""
        window = self.options.window
        self._losses = deque(state.get("losses", ()), maxlen=window)
        self._norms = deque(state.get("grad_norms", ()), maxlen=window)
        self._bad_steps = deque(state.get("bad_steps", ()))
        self._in_a_row = state.get("in_a_row", 0)
        self._good_in_a_row = state.get("good_in_a_row", 0)
        self.num_skipped = state.get("num_skipped", 0)
        self.num_not_finite = state.get("num_not_finite", 0)
        self.rollbacks = state.get("rollbacks", 0)
        self.recent_rollbacks = state.get("recent_rollbacks", 0)

    def _note_good(self, loss: float, grad_norm: float) -> None:
        self._in_a_row = 0
        self._good_in_a_row += 1
        if self._good_in_a_row >= self.options.window:
            self.recent_rollbacks = 0
        if self.options.loss_factor:
            self._losses.append(loss)
        if self.options.grad_norm_factor:
            self._norms.append(grad_norm)

    def _wrong_with(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss:g}"
        if not math.isfinite(grad_norm):
            return "the gradient norm is not finite"
        return self._leap(loss, grad_norm)

    def _leap(self, loss: float, grad_norm: float) -> str:
        """What leaps, in words; empty if nothing does."""
        options = self.options
        for name, value, factor, history in (
            ("the loss", loss, options.loss_factor, self._losses),
            ("the gradient norm", grad_norm, options.grad_norm_factor, self._norms),
        ):
            # A quarter of the window is enough to know what is normal.
            if not factor or len(history) * 4 < options.window:
                continue
            median = statistics.median(history)
            if median > 0 and value > factor * median:
                return (
                    f"{name} {value:.4g} is {value / median:.3g} times the median {median:.4g} of "
                    f"{len(history)} steps (at most {factor:g})"
                )
        return ""

    def _too_many(self) -> str:
        options = self.options
        if self._in_a_row > options.skips_in_a_row:
            bound = f"anomaly_skips_in_a_row: {options.skips_in_a_row}"
            return f"{self._in_a_row} bad steps in a row ({bound})"
        if options.skips_in_window is not None and len(self._bad_steps) > options.skips_in_window:
            bound = f"anomaly_skips_in_window: {options.skips_in_window}"
            return f"{len(self._bad_steps)} bad steps among the last {options.window} ({bound})"
        return ""
