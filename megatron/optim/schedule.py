"""The learning rate as a function of the step, and of nothing else.

No state is kept, so there is nothing to save and a resumed run cannot disagree. Invariant: for every step the rate lies
between 0 and `lr`, and after the warm-up between `min_lr` and `lr`.

Source: upstream's annealing, with two faults left out: a warm-up shorter than one step no longer lifts the first rate
above `lr`, and the cosine stays at `min_lr` past its end instead of rising again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

DecayStyle = Literal["constant", "linear", "cosine", "exponential"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up over the first `warmup * decay_iters` steps, then decay from `lr` to `min_lr`.

    lr: the highest rate.
    style: constant: stay at `lr`; linear; cosine (Loshchilov & Hutter 2016, arXiv 1608.03983, equation 5, no restart);
        exponential: halved once per `decay_iters` (upstream's exponent -0.693), never below `min_lr`.
    decay_iters: the step at which linear and cosine reach `min_lr`, and where they stay from then on.
    warmup: the fraction of `decay_iters` that warms up.
    """

    lr: float
    style: DecayStyle = "linear"
    decay_iters: int = 1
    min_lr: float = 0.0
    warmup: float = 0.01

    def __post_init__(self) -> None:
        if self.style not in ("constant", "linear", "cosine", "exponential"):
            raise ValueError(f"lr_decay_style {self.style!r} is not one of constant, linear, cosine, exponential")
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        if self.decay_iters < 1 or not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"lr_decay_iters {self.decay_iters} must be positive and warmup {self.warmup} in [0, 1]")

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up in steps; not rounded, as upstream does not round it."""
        return self.warmup * self.decay_iters

    def lr_at(self, step: int) -> float:
        """The rate after `step` finished steps, as upstream counts; 0 counts as 1, so that no step has a rate of 0."""
        step = max(step, 1)
        warmup = self.warmup_steps
        if step <= warmup:
            return self.lr * step / warmup
        if self.style == "constant":
            return self.lr
        remaining = self.decay_iters - warmup
        progress = (step - warmup) / remaining if remaining > 0 else 1.0
        if self.style == "exponential":
            return max(self.lr * math.exp(-0.693 * progress), self.min_lr)
        progress = min(progress, 1.0)
        if self.style == "linear":
            return max(self.lr * (1.0 - progress), self.min_lr)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
