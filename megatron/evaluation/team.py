"""One rank drives, the others serve: how several ranks share the work of an evaluation.

lm-eval runs on rank 0 alone, as if there were one process, so prompts and scores cannot depend on the number of ranks.
Work is cut into chunks there; each data-parallel replica takes every dp_size-th chunk, whole, so that a chunk is
computed with the same shapes at any number of ranks. Not here: what a chunk is.
Invariant: a failure on any rank, or a signal to it, ends the work on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.common.errors import MegatronError, Stopped
from megatron.common.heartbeat import beat
from megatron.parallel.process_groups import ProcessGroups

# Chunks that a replica gets at a time: enough to hide the exchange, few enough for a live progress display.
CHUNKS_PER_WAVE = 4

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class _Wave:
    kind: str
    chunks: Sequence[Any]


@dataclass(frozen=True)
class _End:
    problem: BaseException | None


class Team:
    """The ranks of a run, all of which hold (a part of) the model; `work` is what is done with each kind of chunk.

    asked: the signal that asks this rank to stop, or 0. It goes along with the results of each wave.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        work: Mapping[str, Work],
        device: torch.device,
        asked: Callable[[], int] = lambda: 0,
    ) -> None:
        self.groups = groups
        self._asked = asked
        self._work = work
        self._device = device
        self._is_alone = groups.topology.world_size == 1

    def lead(self, task: Callable[[], Any]) -> Any:
        """Run `task` on rank 0, which may call `map`; the other ranks serve it until it ends and return None.

        Collective. Raises: what `task` raises; the other ranks the same, or a MegatronError that tells of a defect;
        Stopped on all ranks when one was asked to stop.
        """
        if not self.groups.is_main:
            self._serve()
            return None
        problem: BaseException | None = None
        try:
            return task()
        except BaseException as error:
            problem = error
            raise
        finally:
            if not self._is_alone:
                self._broadcast(_End(_portable(problem)))

    def map(self, kind: str, chunks: Sequence[Any], on_done: Callable[[int], None] = lambda count: None) -> list[Any]:
        """The results of all chunks, in order; only within `lead`. `on_done` hears how many more are finished."""
        results: list[Any] = []
        width = CHUNKS_PER_WAVE * self.groups.dp_size
        for start in range(0, len(chunks), width):
            wave = _Wave(kind, chunks[start : start + width])
            if not self._is_alone:
                self._broadcast(wave)
            results += self._compute(wave)
            on_done(len(wave.chunks))
        return results

    def _serve(self) -> None:
        while True:
            message = self._broadcast(None)
            if isinstance(message, _End):
                if message.problem is not None:
                    raise message.problem
                return
            self._compute(message)

    def _do(self, kind: str, chunk: list[Any]) -> Any:
        beat()
        # Tensor-parallel ranks compute a chunk together: if one left, the others would wait. They stop behind the wave.
        if self.groups.tp_size == 1 and (number := self._asked()):
            raise Stopped(number)
        return self._work[kind](chunk)

    def _compute(self, wave: _Wave) -> list[Any]:
        groups = self.groups
        mine = wave.chunks[groups.dp_rank :: groups.dp_size]
        if self._is_alone:
            return [self._do(wave.kind, chunk) for chunk in mine]
        problem, results = None, []
        try:
            results = [self._do(wave.kind, chunk) for chunk in mine]
        except Stopped:
            pass  # `asked` still tells it, and goes to rank 0 with the outcome
        except Exception as error:
            problem = f"rank {groups.global_rank}: {type(error).__name__}: {error}"
        outcome = (problem, self._asked(), groups.dp_rank, results if groups.tp_rank == 0 else None)
        gathered: list[Any] | None = [None] * groups.topology.world_size if groups.is_main else None
        dist.gather_object(outcome, gathered, dst=0)
        if gathered is None:
            return []
        problems = [found for found, _, _, _ in gathered if found is not None]
        if problems:
            raise MegatronError("the evaluation failed on " + "; on ".join(problems))
        if number := max(asked for _, asked, _, _ in gathered):
            raise Stopped(number)
        merged: list[Any] = [None] * len(wave.chunks)
        for _, _, dp_rank, part in gathered:
            if part is not None:
                merged[dp_rank :: groups.dp_size] = part
        return merged

    def _broadcast(self, message: Any) -> Any:
        box = [message]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]


def _portable(problem: BaseException | None) -> BaseException | None:
    # Only our own errors are sure to survive the journey, and only they are free of a traceback at their end.
    if problem is None:
        return None
    if isinstance(problem, MegatronError | Stopped):
        return type(problem)(*problem.args)
    return MegatronError(f"rank 0 stopped the evaluation with {type(problem).__name__}: {problem}")
