"""`profile` and `memory_profiling`: a trace of some steps, for chrome://tracing or Perfetto; a record of CUDA memory.

Each rank writes files of its own. Invariant: outside the asked steps nothing is recorded but the history of CUDA
memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class StepProfiler:
    """Profiles the steps `first` to `last`, both counted from 1 and included.

    trace_folder: where the trace goes, None for none. memory_folder: likewise for the CUDA memory snapshot, which
    is written after the last of the steps.
    """

    def __init__(
        self,
        rank: int,
        first: int,
        last: int,
        *,
        trace_folder: Path | None = None,
        memory_folder: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.rank, self.first, self.last = rank, first, last
        self.trace_folder, self.memory_folder, self.say = trace_folder, memory_folder, say
        self._trace: Any = None
        if memory_folder is not None and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history()

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Make optimizer step `step` within."""
        # A run that continues in the middle of the range records what is left of it.
        if self._trace is None and self.trace_folder is not None and self.first <= step <= self.last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
            self._trace.start()
        try:
            with torch.profiler.record_function(f"step {step}") if self._trace else contextlib.nullcontext():
                yield
        except BaseException:
            # A step that fails or is interrupted is often the one to look at.
            self._write_trace(step)
            raise
        if step >= self.last:
            self._write_trace(step)
            self._write_memory()

    def close(self) -> None:
        """Write what is under way, where the run ends inside the range."""
        self._write_trace(self.last)
        self._write_memory()

    def _write_trace(self, step: int) -> None:
        if self._trace is None or self.trace_folder is None:
            return
        trace, self._trace, folder, self.trace_folder = self._trace, None, self.trace_folder, None
        trace.stop()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace_steps{self.first}-{step}_rank{self.rank}.json"
        trace.export_chrome_trace(str(path))
        if self.rank == 0:
            self.say(f"profile of steps {self.first} to {step}: {path} (open it in https://ui.perfetto.dev)")

    def _write_memory(self) -> None:
        folder, self.memory_folder = self.memory_folder, None
        if folder is None or not torch.cuda.is_available():
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ("mem_snapshot.pickle" if self.rank == 0 else f"mem_snapshot_rank{self.rank}.pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        if self.rank == 0:
            self.say(f"CUDA memory snapshot: {path} (open it in https://pytorch.org/memory_viz)")
