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

from megatron.common.errors import NonFiniteLossError, Stopped
from megatron.data.loader import BatchLoader
from megatron.engine.replicas import ReplicaCheck
from megatron.engine.train_engine import StepResult, TrainEngine
from megatron.optim.schedule import LearningRateSchedule
from megatron.training.plan import RunPlan
from megatron.training.reliability.signals import StopRequest
from megatron.training.reporting import Reporter
from megatron.training.saver import Saver
from megatron.training.saving import Position

# fp16 may overflow now and then while the loss scale settles; this many in a row means that it never will.
MAX_SKIPPED_IN_A_ROW = 50


@dataclass
class Run:
    """All parts of a training run on this rank.

    score: gives the scores of eval_tasks at each validation; it raises Stopped on all ranks when any is asked to stop.
    saved_step: the step whose state the disk holds, or that has nothing to keep.
    """

    engine: TrainEngine
    plan: RunPlan
    schedule: LearningRateSchedule
    train: BatchLoader
    valid: BatchLoader | None
    test: BatchLoader | None
    reporter: Reporter
    saver: Saver
    position: Position = field(default_factory=Position)
    replicas: ReplicaCheck | None = None
    score: Callable[[], dict[str, float]] | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    saved_step: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0

    def close(self) -> None:
        """Wait for a save in the background, stop reading ahead, and let go of display and logs."""
        self.saver.close()
        for loader in (self.train, self.valid, self.test):
            if loader is not None:
                loader.close()
        self.reporter.close()


def train(run: Run) -> int:
    """Train until train_iters, until exit_interval says to leave, or until `run.stop` does. Collective.

    A stop waits for no more than the step or the batch of a validation that is under way; the state after that step is
    saved unless it has just been. A validation or test that is due then is left to the run that continues.
    Returns: the exit code, 0 or that of the stop; the last checkpoint is on the disk then.
    Raises: NonFiniteLossError if the loss or the gradient norm is NaN or infinite; nothing of that step is saved.
    CheckpointError if a save failed and on_save_failure is stop, or if the last one failed.
    """
    code = _until_done(run)
    run.saver.finish()
    return code


def _until_done(run: Run) -> int:
    plan, position, stop = run.plan, run.position, run.stop
    run.saved_step = position.step
    if position.step >= plan.train_iters:
        run.reporter.message(f"step {position.step} of {plan.train_iters} is reached already: nothing to train")
    if not stop.agreed_at_start() and position.validation_due:
        _validate(run)
    if position.step >= plan.train_iters:
        return _leave(run) if stop.agreed() else 0
    if position.step == 0 and plan.saves.is_due(0) and not stop.agreed():
        _save(run)
    while position.step < plan.train_iters and not stop.agreed():
        _train_one(run)
        position.validation_due = plan.validates_at(position.step)
        if position.validation_due and not stop.agreed():
            _validate(run)
        if plan.saves_at(position.step):
            _save(run)
        if plan.exits_at(position.step) and position.step < plan.train_iters and not stop.agreed():
            run.reporter.message(f"leaving after step {position.step} (exit_interval)")
            return 0
    return _leave(run) if stop.agreed() else 0


def evaluate(run: Run, loader: BatchLoader) -> float | None:
    """Mean loss over the first eval_iters batches: the same samples every time, so that values compare.

    None if the run is to stop, which is asked between batches.
    """
    losses: list[float] = []
    for index in range(run.plan.eval_iters):
        if losses and run.stop.agreed():
            return None
        losses.append(run.engine.evaluate(loader.step_batches(index * run.plan.global_batch_size)))
    return sum(losses) / len(losses)


def _leave(run: Run) -> int:
    """Keep what is not yet on the disk, and say why the run ends here."""
    step = run.position.step
    if run.saved_step != step:
        _save(run)
    run.reporter.message(f"leaving after step {step} of {run.plan.train_iters} ({run.stop.reason})")
    return run.stop.exit_code


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
    run.saver.poll()


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
    """The validation of this step, and at the run's end the test; given up where the run is to stop."""
    loaders = {"validation": run.valid, "test": run.test if run.position.step == run.plan.train_iters else None}
    for name, loader in loaders.items():
        if loader is None:
            continue
        loss = evaluate(run, loader)
        if loss is None:
            return
        run.reporter.evaluated(name, run.position.step, loss)
    if run.score is not None:
        try:
            scores = run.score()
        except Stopped:
            return
        run.reporter.scored(run.position.step, scores)
    run.position.validation_due = False


def _save(run: Run) -> None:
    run.saver.save(run.position)
    run.saved_step = run.position.step
