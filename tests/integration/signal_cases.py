"""Training runs through the real command, on every rank of a warm pool, that get a signal at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from megatron.cli import train as command
from megatron.common.errors import Stopped
from megatron.data import index_cache
from megatron.engine.train_engine import TrainEngine
from megatron.training import saver

PHASES = {
    "start": (TrainEngine, "__init__"),
    "index": (index_cache.np, "save"),
    "train": (TrainEngine, "train_step"),
    "validate": (TrainEngine, "evaluate"),
    "save": (sys.modules["megatron.checkpoint.save"], "_write_rank"),
}


def stopped_run(
    config_path: str, phase: str, count: int = 1, rank: int | None = None, number: int = signal.SIGTERM
) -> dict[str, Any]:
    """`train.py CONFIG`; when `rank` calls what the phase does for the `count`-th time, it gets the signal.

    rank None: all ranks get it when rank 0 is there. phase "never": no signal. Returns the exit code, the losses of the
    steps, the steps that were saved, and how many batches were evaluated.
    """
    seen: dict[str, Any] = {"losses": [], "saved": [], "evaluated": 0}
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    with contextlib.ExitStack() as stack:
        stack.enter_context(_each_call(TrainEngine, "train_step", lambda result: seen["losses"].append(result.loss)))
        stack.enter_context(_each_call(TrainEngine, "evaluate", lambda _: seen.update(evaluated=seen["evaluated"] + 1)))
        stack.enter_context(_each_call(saver, "save_run", lambda saved: seen["saved"].append(saved.folder.name)))
        if phase != "never":
            # One rank sends, as a scheduler would: each rank is told once.
            targets = pids if rank is None else [pids[rank]]
            if dist.get_rank() == (rank or 0):
                stack.enter_context(_signal_in(*PHASES[phase], count, targets, number))
        try:
            seen["code"] = command.main([config_path])
        except Stopped as stop:
            seen["code"] = stop.exit_code
    return seen


@contextlib.contextmanager
def _each_call(owner: Any, name: str, then: Callable[[Any], None]) -> Iterator[None]:
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then(result)
        return result

    setattr(owner, name, watched)
    yield
    setattr(owner, name, original)


@contextlib.contextmanager
def _signal_in(owner: Any, name: str, count: int, targets: list[int], number: int) -> Iterator[None]:
    original = getattr(owner, name)
    calls = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            for pid in sorted(targets, key=lambda pid: pid == os.getpid()):  # this one may raise: it is the last
                os.kill(pid, number)
        return original(*args, **kwargs)

    setattr(owner, name, watched)
    yield
    setattr(owner, name, original)
