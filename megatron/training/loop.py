"""The loop over optimizer steps: learn, look, validate, save, stop.

Everything it needs lies in a `Run`; it reads no configuration. Invariant: what happens after step n depends on n, on
the weights and on the data alone, so that a run continued from a checkpoint is the same run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.common.errors import NonFiniteLossError
from megatron.data.loader import BatchLoader
from megatron.engine.replicas import ReplicaCheck
from megatron.engine.train_engine import StepResult, TrainEngine
from megatron.optim.schedule import LearningRateSchedule
from megatron.training.plan import RunPlan
from megatron.training.reporting import Reporter
from megatron.training.saving import Position, SaveOptions, save_run

# fp16 may overflow now and then while the loss scale settles; this many in a row means that it never will.
MAX_SKIPPED_IN_A_ROW = 50


@dataclass
class Run:
    """All parts of a training run on this rank. score: gives the scores of eval_tasks at each validation."""

    engine: TrainEngine
    plan: RunPlan
    schedule: LearningRateSchedule
    train: BatchLoader
    valid: BatchLoader | None
    test: BatchLoader | None
    reporter: Reporter
    saving: SaveOptions
    position: Position = field(default_factory=Position)
    replicas: ReplicaCheck | None = None
    score: Callable[[], dict[str, float]] | None = None
    skipped_in_a_row: int = 0
    skipped: int = 0

    def close(self) -> None:
        """Stop reading ahead, and let go of display and logs."""
        for loader in (self.train, self.valid, self.test):
            if loader is not None:
                loader.close()
        self.reporter.close()


def train(run: Run) -> None:
    """Train until train_iters, or until exit_interval says to leave. Collective.

    Raises: NonFiniteLossError if the loss or the gradient norm is NaN or infinite; nothing of that step is saved.
    """
    plan, position = run.plan, run.position
    if position.step >= plan.train_iters:
        run.reporter.message(f"step {position.step} of {plan.train_iters} is reached already: nothing to train")
        return
    if position.step == 0 and plan.saves.is_due(0):
        _save(run)
    while position.step < plan.train_iters:
        _train_one(run)
        if plan.validates_at(position.step):
            _validate(run)
        if plan.saves_at(position.step):
            _save(run)
        if plan.exits_at(position.step) and position.step < plan.train_iters:
            run.reporter.message(f"leaving after step {position.step} (exit_interval)")
            return
    if run.test is not None and plan.eval_iters > 0:
        run.reporter.evaluated("test", position.step, evaluate(run, run.test))


def evaluate(run: Run, loader: BatchLoader) -> float:
    """Mean loss over the first eval_iters batches: the same samples every time, so that values compare."""
    losses = [
        run.engine.evaluate(loader.step_batches(index * run.plan.global_batch_size))
        for index in range(run.plan.eval_iters)
    ]
    return sum(losses) / len(losses)


def _train_one(run: Run) -> None:
    started, started_cpu = time.perf_counter(), time.process_time()
    learning_rate = run.schedule.lr_at(run.position.step)
    batches = run.train.step_batches(run.position.consumed_samples)
    with run.replicas.around(run.position.step + 1) if run.replicas is not None else contextlib.nullcontext():
        result = run.engine.train_step(batches, learning_rate)
    _check_finite(run, result, [sample for batch in batches for sample in batch.sample_ids])
    run.position.step += 1
    run.position.consumed_samples += run.plan.global_batch_size
    run.reporter.stepped(
        run.position.step,
        result,
        learning_rate=learning_rate,
        elapsed_s=time.perf_counter() - started,
        cpu_s=time.process_time() - started_cpu,
        num_skipped=run.skipped,
        epoch=run.train.epoch(run.position.consumed_samples),
    )


def _check_finite(run: Run, result: StepResult, sample_ids: list[int]) -> None:
    if result.is_skipped:
        run.skipped += 1
        run.skipped_in_a_row += 1
        if run.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(
                f"{run.skipped_in_a_row} steps in a row overflowed in fp16 (loss scale {result.loss_scale}). "
                "The last good state is in the newest checkpoint. Lower the learning rate, or use precision: bfloat16."
            )
        return
    run.skipped_in_a_row = 0
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    raise NonFiniteLossError(
        f"step {run.position.step + 1}: loss {result.loss:g}, gradient norm {result.grad_norm:g}, on samples "
        f"{_brief(sample_ids)} of this rank. Nothing of this step was saved; "
        "continue from the newest checkpoint with a lower learning rate, "
        "stronger gradient_clipping, or other data."
    )


def _brief(sample_ids: list[int]) -> str:
    shown = ", ".join(map(str, sample_ids[:8]))
    return shown if len(sample_ids) <= 8 else f"{shown}, ... ({len(sample_ids)} in all)"


def _validate(run: Run) -> None:
    if run.valid is not None:
        run.reporter.evaluated("validation", run.position.step, evaluate(run, run.valid))
    if run.score is not None:
        run.reporter.scored(run.position.step, run.score())


def _save(run: Run) -> None:
    started = time.perf_counter()
    saved = save_run(run.engine, run.position, run.saving)
    if saved is None:
        return
    run.reporter.message(f"saved {saved.folder} in {time.perf_counter() - started:.1f} s")
    for warning in saved.warnings:
        run.reporter.message(f"warning: {warning}")
    if saved.differing_replicas:
        names = ", ".join(saved.differing_replicas[:5])
        run.reporter.message(f"warning: copies of {names} differ between ranks; rank 0's were saved")
