"""What a run leaves behind to be compared with the same run at another layout: losses, norms, and whole tensors.

Not here: the comparison (megatron.training.comparison). Invariant: a trace depends on the layout by rounding alone,
unless something is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.common.files import atomic_write_text
from megatron.training.loop import Run
from megatron.training.saving import Position, SaveOptions, save_run

_SUMMARY = "trace.json"


@dataclass(frozen=True)
class Trace:
    """What is known of every step, the first first. saved: the steps (0: before the first) whose tensors are in the
    folder."""

    precision: str
    losses: list[float]
    norms: list[float]
    learning_rates: list[float]
    skipped: list[bool]
    saved: list[int]

    @classmethod
    def read(cls, folder: Path) -> Trace:
        """The trace that `record` left in the folder."""
        return cls(**json.loads((folder / _SUMMARY).read_text()))


def record(run: Run, folder: Path, steps: int, at: Collection[int]) -> None:
    """Train `steps` steps of the run; keep the tensors before the first, and after each step in `at`. Collective.

    Tensors are kept as checkpoints in the folder: weights in fp32, and the optimizer's moments.
    """
    engine = run.engine
    trace = Trace(engine.options.precision, [], [], [], [], [0, *sorted(set(at))])
    options = SaveOptions(folder, with_rng=False)
    save_run(engine, Position(), options)
    for step in range(1, steps + 1):
        learning_rate = run.schedule.lr_at(step - 1)
        result = engine.train_step(run.train.step_batches((step - 1) * run.plan.global_batch_size), learning_rate)
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        trace.learning_rates.append(learning_rate)
        trace.skipped.append(result.is_skipped)
        if step in at:
            save_run(engine, Position(step), options)
    if engine.groups.is_main:
        atomic_write_text(folder / _SUMMARY, json.dumps(asdict(trace)))
