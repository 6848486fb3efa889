"""Whole runs whose storage fails or whose process is killed in the middle of a save; on ranks of a warm pool."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.checkpoint import save as save_module
from megatron.checkpoint.storage import Storage
from megatron.common.errors import CheckpointError
from megatron.training import saver as saver_module
from tests.integration.run_cases import train_run, write_config

_CHANGING = ("make_directory", "create", "write", "flush", "rename", "unlink", "remove_tree")


def watch(before: Callable[[str, Any], None]) -> None:
    """Call `before(operation, path or descriptor)` ahead of every operation of every save of this process."""

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(Storage, name)

        def operation(self: Storage, first: Any, *rest: Any) -> Any:
            before(name, first)
            return real(self, first, *rest)

        return operation

    members = {name: watched(name) for name in _CHANGING}
    watching = type("WatchedStorage", (Storage,), members)
    sys.modules[save_module.__module__].Storage = watching  # type: ignore[attr-defined]
    saver_module.Storage = watching  # type: ignore[misc]


def train_with_full_disk(config_path: str, failures: dict[int, int]) -> dict[str, Any]:
    """Train; the disk of the last rank is full at each file it creates for a step, as often as `failures` says.

    Returns the messages too, and the error with which the run stopped.
    """
    messages: list[str] = []
    left = dict(failures)

    def before(operation: str, path: Any) -> None:
        if operation == "create" and dist.get_rank() == dist.get_world_size() - 1:
            for step, count in left.items():
                if f".global_step{step}.tmp/rank" in str(path) and count:
                    left[step] -= 1
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watch(before)
    real = saver_module.Saver.__init__

    def hearing(self: Any, engine: Any, options: Any, message: Any) -> None:
        real(self, engine, options, messages.append)
        if self._background is not None:
            self._background._pauses_s = (0.0, 0.0)

    saver_module.Saver.__init__ = hearing  # type: ignore[method-assign]
    error, result = "", {}
    try:
        result = train_run(config_path)
    except CheckpointError as problem:
        error = str(problem)
    return {**result, "messages": messages, "error": error}


def killed_at_every_operation(folder: str, changes: dict[str, Any], which: str) -> dict[str, Any]:
    """For each operation of the save of step 4: a run that is killed ahead of it, and the step it then goes on from.

    which: "all" operations; "kinds": of many writes in a row into one file, the first, one in the middle and the last
    stand for all; "half": every other one of these.
    Returns {operations: the names, starts: per number of operations done}; final checkpoints are for the caller.
    """
    dist.destroy_process_group()  # children start their own: threads do not survive a fork
    os.environ["WORLD_SIZE"] = "1"
    root, log = Path(folder), Path(folder) / "operations"

    def config(name: str) -> str:
        return str(write_config(root, name, checkpoint_factor=2, **changes))

    assert _child(lambda: _train_counting(config("whole"), 10**9, log)) == 0
    operations = log.read_text().splitlines()
    first = next(number for number, line in enumerate(operations) if "global_step4" in line)
    end = next(number for number, line in enumerate(operations) if "global_step6" in line)
    starts = {}
    for count in _worth_it(operations, first, end, which):
        name, to = f"killed{count}", root / f"start{count}"
        status = _child(lambda name=name, count=count: _train_counting(config(name), count, None))  # type: ignore[misc]
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise AssertionError(f"not killed after {count} operations, but ended with {status}")
        status = _child(lambda name=name, to=to: to.write_text(str(train_run(config(name))["start"])))  # type: ignore[misc]
        assert status == 0, f"killed after {count} operations, {operations[count]}: does not go on"
        starts[count] = int(to.read_text())
    return {"starts": starts, "operations": operations}


def _worth_it(operations: list[str], first: int, end: int, which: str) -> list[int]:
    chosen = []
    for number in range(first, end):
        neighbours = operations[number - 1 : number + 2]
        is_inside = all(other.startswith("write") for other in neighbours)
        if which == "all" or not is_inside or (number - first) % 40 == 0:
            chosen.append(number)
    return chosen[::2] if which == "half" else chosen


def _train_counting(config_path: str, kill_after: int, log: Path | None) -> None:
    done: list[str] = []

    def before(operation: str, path: Any) -> None:
        if len(done) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(f"{operation} {path}")

    watch(before)
    train_run(config_path)
    if log is not None:
        log.write_text("\n".join(done))


def _child(work: Callable[[], Any]) -> int:
    """Run `work` in a fork of this process; its wait status."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(process, 0)[1]
