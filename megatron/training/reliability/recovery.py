"""Carry out what the anomaly policy decides: tell, roll the run back within the process, or stop it with exit code 6.

Not here: the decision (anomaly.py), and how a step is kept from the weights (megatron.engine.step_guard).
Invariant: every rank calls the same functions in the same order; whatever is raised is raised on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.find import LATEST, complete
from megatron.checkpoint.location import Location, RemotePath
from megatron.checkpoint.object_storage import ObjectStorage
from megatron.checkpoint.storage import Storage
from megatron.common.errors import CheckpointError, NonFiniteLossError
from megatron.data.loader import Batch
from megatron.engine.origin import Origin, find_origin
from megatron.engine.train_engine import StepResult, TrainEngine
from megatron.training.reliability.anomaly import AnomalyPolicy, Decision
from megatron.training.resuming import LoadOptions, load_run
from megatron.training.saving import Position, SaveOptions


@dataclass(frozen=True)
class Recovery:
    """What a run needs in order to recover.

    saving: where its checkpoints are, if it makes any. before_rollback: called before checkpoints are read, so that one
    that is still being written arrives first.
    """

    engine: TrainEngine
    policy: AnomalyPolicy
    message: Callable[[str], None]
    saving: SaveOptions
    before_rollback: Callable[[], None] = lambda: None

    def after_skip(
        self,
        decision: Decision,
        step: int,
        result: StepResult,
        batches: Sequence[Batch],
        random_states: tuple[torch.Tensor, torch.Tensor],
    ) -> Origin | None:
        """Tell of a skipped step; where it was not finite, find out where that came from. Collective."""
        policy = self.policy
        what = f"step {step} skipped: {decision.reason}"
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self.message(f"warning: {what}; samples {_span(batches, self.engine)}; {policy.num_skipped} skipped so far")
            return None
        origin = find_origin(self.engine, batches, random_states)
        self.message(f"warning: {what}; {origin}; {policy.num_skipped} skipped so far")
        return origin

    def roll_back(self, position: Position) -> Position | None:
        """Put the run back to the newest checkpoint from before the bad steps; None if there is none. Collective.

        A second time without progress goes one checkpoint further back.
        Raises: CheckpointError if none of those there can be loaded.
        """
        failure: CheckpointError | None = None
        first_bad = self.policy.first_bad_step
        folder = self.saving.folder
        if folder is None or first_bad is None:
            return None
        self.before_rollback()
        candidates = self._on_main(lambda: _steps_before(folder, first_bad), f"{folder} cannot be listed") or []
        for step in candidates[min(self.policy.recent_rollbacks, max(0, len(candidates) - 1)) :]:
            options = LoadOptions(folder, step, with_rng=self.saving.with_rng)
            try:
                loaded = load_run(self.engine, options, self.saving.facts, self.message)
            except CheckpointError as error:
                self.message(f"warning: cannot go back to step {step}: {error}")
                failure = error
                continue
            # What was written later belongs to a course that is left; a restart must not take it up.
            disk = ObjectStorage() if isinstance(folder, RemotePath) else Storage()
            self._on_main(
                lambda disk=disk, step=step: disk.replace_text(folder / LATEST, f"global_step{step}"),  # type: ignore[misc]
                f"{folder / LATEST} cannot be set to step {step}, from which the run would go on",
            )
            self.policy.rolled_back(loaded.anomalies)
            behind = position.consumed_samples
            if self.policy.options.skip_data:
                loaded.consumed_samples = max(behind, loaded.consumed_samples)
            where = f"sample {loaded.consumed_samples}" + (
                ", behind the bad steps" if self.policy.options.skip_data else ""
            )
            bound = self.policy.options.rollbacks
            self.message(
                f"warning: rolled back to step {loaded.step}; the data goes on at {where} "
                f"(roll-back {self.policy.recent_rollbacks} of at most {bound})"
            )
            return loaded
        if failure is not None:
            # What is in memory now may be half of a checkpoint: nothing may be saved or trained any more.
            raise failure
        return None

    def _on_main(self, work: Callable[[], Any], failed: str) -> Any:
        """What `work` gives on the main rank, for all. Collective. Raises: CheckpointError on all if it fails there."""
        answer: list[Any] = [None, ""]
        if self.engine.groups.is_main:
            try:
                answer[0] = work()
            except (OSError, CheckpointError) as error:
                answer[1] = f"{failed}: {error}. Mend that, then start the run again."
        dist.broadcast_object_list(answer, src=0)
        if answer[1]:
            raise CheckpointError(answer[1])
        return answer[0]

    def stop(self, decision: Decision, step: int, origin: Origin | None, *, is_saved: bool) -> NonFiniteLossError:
        """The error that ends the run."""
        no_rollback = ""
        if decision.action == "roll_back":
            no_rollback = " There is no checkpoint from before them to go back to."
        elif self.policy.recent_rollbacks:
            no_rollback = f" Rolled back already (anomaly_rollbacks: {self.policy.options.rollbacks})."
        found = f" {str(origin)[0].upper()}{str(origin)[1:]}." if origin is not None else ""
        if origin is not None and origin.has_bad_state:
            state = "The state in memory is not finite and was not saved: continue from an older checkpoint."
        elif is_saved:
            state = (
                "None of these steps moved a weight. A run continued from the newest checkpoint has the weights from "
                "before the first of them, and goes on with the data behind them."
            )
        else:
            state = "None of these steps moved a weight, and the run has no save folder that could hold them."
        return NonFiniteLossError(
            f"step {step}: {decision.reason}.{found}{no_rollback}\n{state} Go on with a lower learning rate, stronger "
            "gradient_clipping or other data; docs/failures.md tells what the anomaly_* keys do."
        )


def _steps_before(folder: Location, step: int) -> list[int]:
    """Steps of the complete checkpoints from before `step`, the newest first."""
    return sorted({found.step for found in complete(folder)[0] if found.step < step}, reverse=True)


def _span(batches: Sequence[Batch], engine: TrainEngine) -> str:
    """The samples of the whole step: consecutive in the data's order but where an epoch ends."""
    first = batches[0].sample_ids[0] - engine.groups.dp_rank * len(batches[0].sample_ids)
    count = engine.groups.dp_size * sum(len(batch.sample_ids) for batch in batches)
    return f"{first} to {first + count - 1}"
