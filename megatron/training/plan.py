"""When things happen in a run: pure arithmetic on steps.

Invariant: every answer depends on the step alone, so that a resumed run does what the uninterrupted one would have
done.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SaveSchedule:
    """At which steps a checkpoint is written.

    scale linear: every multiple of `factor`; log: the powers of `factor` (rounded down to whole steps), and step 1.
    extra: further steps, 0 allowed.
    """

    scale: Literal["linear", "log"] = "linear"
    factor: float | None = None
    extra: Collection[int] = ()

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` steps."""
        if step in self.extra:
            return True
        if self.factor is None or step <= 0:
            return False
        if self.scale == "linear":
            return step % int(self.factor) == 0
        power = 1.0
        while int(power) < step:
            power *= self.factor
        return int(power) == step


@dataclass(frozen=True)
class RunPlan:
    """The numbers that steer the loop.

    Units: *_iters and *_interval in optimizer steps; tokens_per_step over all ranks.
    """

    train_iters: int
    global_batch_size: int
    seq_length: int
    eval_interval: int
    eval_iters: int
    log_interval: int
    exit_interval: int | None
    saves: SaveSchedule

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.global_batch_size * self.seq_length

    def validates_at(self, step: int) -> bool:
        """Whether to validate after `step` steps: at every interval, and at the end."""
        return self.eval_iters > 0 and (step % self.eval_interval == 0 or step == self.train_iters)

    def saves_at(self, step: int) -> bool:
        """Whether to save after `step` steps: on schedule, at the end, and before leaving at exit_interval."""
        return self.saves.is_due(step) or step == self.train_iters or self.exits_at(step)

    def exits_at(self, step: int) -> bool:
        """Whether to leave after `step` steps although the run is not done."""
        return self.exit_interval is not None and step % self.exit_interval == 0
