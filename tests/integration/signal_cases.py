"""Training runs through the real command, on every rank of a warm pool, that get a signal at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron.checkpoint.background import BackgroundSaver
from megatron.cli import train as command
from megatron.common.errors import Stopped
from megatron.data import index_cache
from megatron.engine.train_engine import TrainEngine
from megatron.training import saver
from megatron.training.reliability.signals import StopRequest

PHASES = {
    "start": (TrainEngine, "__init__"),
    "index": (index_cache.np, "save"),
    "train": (TrainEngine, "train_step"),
    "validate": (TrainEngine, "evaluate"),
    "save": (sys.modules["megatron.checkpoint.save"], "_write_rank"),
}


def stopped_run(
    config_path: str,
    phase: str,
    count: int = 1,
    rank: int | None = None,
    number: int = signal.SIGTERM,
    times: int = 1,
    late_after: int | None = None,
) -> dict[str, Any]:
    """`train.py CONFIG`; when `rank` calls what the phase does for the `count`-th time, it gets the signal `times`
    times.

    rank None: all ranks get it when rank 0 is there. phase "never": no signal. late_after: exit_duration_in_mins is
    over once so many steps are made. A save in the background gets no further than `_write_rank` until it is waited
    for, if that gets the signal.
    Returns the exit code, the losses of the steps, the steps that were saved, and how many batches were evaluated.
    """
    seen: dict[str, Any] = {"losses": [], "saved": [], "evaluated": 0}
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    with contextlib.ExitStack() as stack:
        stack.enter_context(_each_call(TrainEngine, "train_step", lambda result: seen["losses"].append(result.loss)))
        stack.enter_context(_each_call(TrainEngine, "evaluate", lambda _: seen.update(evaluated=seen["evaluated"] + 1)))
        stack.enter_context(_noting_saves(seen["saved"]))
        if late_after is not None:
            clock = StopRequest.__init__.__kwdefaults__
            stack.enter_context(
                mock.patch.dict(clock, clock=lambda: time.time() + 1e9 * (len(seen["losses"]) >= late_after))
            )
        if phase != "never":
            # One rank sends, as a scheduler would: each rank is told once.
            targets = pids if rank is None else [pids[rank]]
            if dist.get_rank() == (rank or 0):
                stack.enter_context(_signal_in(*PHASES[phase], count, targets * times, number))
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

    with mock.patch.object(owner, name, watched):
        yield


@contextlib.contextmanager
def _noting_saves(names: list[str]) -> Iterator[None]:
    """Every save that came about, at once or in the background."""
    original = saver.Saver._saved

    def noting(self: Any, saved: Any, how: str) -> None:
        names.append(saved.folder.name)
        original(self, saved, how)

    with mock.patch.object(saver.Saver, "_saved", noting):
        yield


@contextlib.contextmanager
def _signal_in(owner: Any, name: str, count: int, targets: list[int], number: int) -> Iterator[None]:
    original, wait = getattr(owner, name), BackgroundSaver.wait
    calls = 0
    is_awaited = threading.Event()

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            for pid in sorted(targets, key=lambda pid: pid == os.getpid()):  # this one may raise: it is the last
                os.kill(pid, number)
            if threading.current_thread() is not threading.main_thread():
                assert is_awaited.wait(60)
        return original(*args, **kwargs)

    def awaited(self: BackgroundSaver) -> Any:
        is_awaited.set()
        return wait(self)

    with mock.patch.object(owner, name, watched), mock.patch.object(BackgroundSaver, "wait", awaited):
        yield
