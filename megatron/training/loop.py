"""The loop over optimizer steps: learn, look, validate, save, stop.

Everything it needs lies in a `Run`; it reads no configuration. Invariant: what happens after step n depends on n, on
the weights and on the data alone, so that a run continued from a checkpoint is the same run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron.common.errors import Stopped
from megatron.common.heartbeat import reach
from megatron.data.loader import Batch, BatchLoader
from megatron.engine.replicas import ReplicaCheck
from megatron.engine.statistics import Statistics
from megatron.engine.train_engine import StepResult, TrainEngine
from megatron.optim.schedule import LearningRateSchedule
from megatron.training.characters import CharacterCount
from megatron.training.plan import RunPlan
from megatron.training.profiling import StepProfiler
from megatron.training.reliability.anomaly import AnomalyPolicy, Decision
from megatron.training.reliability.recovery import Recovery
from megatron.training.reliability.signals import StopRequest
from megatron.training.reliability.watchdog import Watchdog
from megatron.training.reporting import Reporter
from megatron.training.saver import Saver
from megatron.training.saving import Position


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
    statistics: Statistics | None = None
    profiler: StepProfiler | None = None
    characters: CharacterCount | None = None
    score: Callable[[], dict[str, float]] | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    saved_step: int = 0
    anomalies: AnomalyPolicy = field(default_factory=AnomalyPolicy)
    watchdog: Watchdog | None = None
    # When elapsed time was last added to the position.
    clock_s: float = field(default_factory=time.perf_counter)

    def close(self) -> None:
        """Wait for a save in the background, stop reading ahead, and let go of display and logs."""
        self.saver.close()
        if self.watchdog is not None:
            self.watchdog.stop()
        for loader in (self.train, self.valid, self.test):
            if loader is not None:
                loader.close()
        if self.profiler is not None:
            self.profiler.close()
        self.reporter.close()


def train(run: Run) -> int:
    """Train until train_iters, until exit_interval says to leave, or until `run.stop` does. Collective.

    A stop waits for no more than the step or the batch of a validation that is under way; the state after that step is
    saved unless it has just been. A validation or test that is due then is left to the run that continues.
    Returns: the exit code, 0 or that of the stop; the last checkpoint is on the disk then.
    Raises: NonFiniteLossError if steps were bad beyond what the anomaly policy bears; none of them moved a weight.
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
        if not _train_one(run):
            continue
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
    if run.characters is not None:
        run.characters.reset()
    for index in range(run.plan.eval_iters):
        if losses and run.stop.agreed():
            return None
        reach(f"a validation after step {run.position.step}, batch {index}")
        batches = loader.step_batches(index * run.plan.global_batch_size)
        losses.append(run.engine.evaluate(batches))
        if run.characters is not None:
            run.characters.add(batches)
    return sum(losses) / len(losses)


def _leave(run: Run) -> int:
    """Keep what is not yet on the disk, and say why the run ends here."""
    step = run.position.step
    if run.saved_step != step:
        _save(run)
    run.reporter.message(f"leaving after step {step} of {run.plan.train_iters} ({run.stop.reason})")
    return run.stop.exit_code


def _train_one(run: Run) -> bool:
    """Make a step. Returns False if the run was rolled back, so that its position is a step done before."""
    started, started_cpu = time.perf_counter(), time.process_time()
    position = run.position
    learning_rate = run.schedule.lr_at(position.step)
    reach(f"step {position.step + 1}, reading its data")
    batches = run.train.step_batches(position.consumed_samples)
    reach(f"step {position.step + 1}, forward and backward")
    states = run.engine.stream.capture()
    with contextlib.ExitStack() as around:
        for watcher in (run.profiler, run.replicas):
            if watcher is not None:
                around.enter_context(watcher.around(position.step + 1))
        if run.statistics is not None:
            around.enter_context(run.statistics.watching())
        result = run.engine.train_step(batches, learning_rate, run.anomalies.accepts)
    statistics = run.statistics.collect(result) if run.statistics is not None else {}
    position.step += 1
    position.consumed_samples += run.plan.global_batch_size
    position.consumed_tokens = position.consumed_samples * run.plan.seq_length
    now = time.perf_counter()
    position.elapsed_s += now - run.clock_s
    run.clock_s = now
    decision = run.anomalies.record(
        position.step,
        result.loss,
        result.grad_norm,
        is_skipped=result.is_skipped,
        is_scale_lowered=result.is_scale_lowered,
    )
    position.anomalies = run.anomalies.state()
    run.reporter.stepped(
        position,
        result,
        learning_rate=learning_rate,
        elapsed_s=now - started,
        cpu_s=time.process_time() - started_cpu,
        num_skipped=run.anomalies.num_skipped,
        num_not_finite=run.anomalies.num_not_finite,
        epoch=run.train.epoch(position.consumed_samples),
        statistics=statistics,
    )
    run.saver.poll()
    if decision.action == "go_on":
        return True
    return _recover(run, decision, result, batches, states)


def _recover(
    run: Run,
    decision: Decision,
    result: StepResult,
    batches: Sequence[Batch],
    states: tuple[torch.Tensor, torch.Tensor],
) -> bool:
    """What the policy decided about the step just skipped. Returns as `_train_one`."""
    recovery = Recovery(
        run.engine,
        run.anomalies,
        run.reporter.message,
        run.saver.options,
        before_rollback=run.saver.settle,
    )
    origin = recovery.after_skip(decision, run.position.step, result, batches, states)
    if decision.action == "skip":
        return True
    if decision.action == "roll_back":
        loaded = recovery.roll_back(run.position)
        if loaded is not None:
            run.position.step, run.position.consumed_samples = loaded.step, loaded.consumed_samples
            run.position.consumed_tokens = loaded.consumed_samples * run.plan.seq_length
            run.position.anomalies, run.position.validation_due = run.anomalies.state(), False
            # The checkpoint of that step does not know where the data goes on.
            run.saved_step = -1
            run.reporter.go_on_from(loaded.step)
            return False
    is_saved = run.saver.options.folder is not None and not (origin is not None and origin.has_bad_state)
    if is_saved:
        _save(run)
    raise recovery.stop(decision, run.position.step, origin, is_saved=is_saved)


def _validate(run: Run) -> None:
    """The validation of this step, and at the run's end the test; given up where the run is to stop."""
    loaders = {"validation": run.valid, "test": run.test if run.position.step == run.plan.train_iters else None}
    for name, loader in loaders.items():
        if loader is None:
            continue
        loss = evaluate(run, loader)
        if loss is None:
            return
        ratio = run.characters.tokens_per_character() if run.characters is not None else None
        run.reporter.evaluated(name, run.position, loss, ratio)
    if run.score is not None:
        reach(f"eval_tasks after step {run.position.step}")
        try:
            scores = run.score()
        except Stopped:
            return
        run.reporter.scored(run.position, scores)
    run.position.validation_due = False


def _save(run: Run) -> None:
    reach(f"saving step {run.position.step}")
    run.saver.save(run.position)
    reach(f"the save of step {run.position.step} done")
    run.saved_step = run.position.step
