"""`RankPool.run_ranks`: call a function on every rank of a small world and get back what each rank returned.

The client side of `tests.pool.server`. One pool serves one pytest process (with pytest-xdist: one per worker).
Invariant: `run_ranks` either returns one value per rank or raises `RankFailure`; it never waits for ever.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.pool import server

START_TIMEOUT_S = 180.0
LOG_TAIL_CHARACTERS = 4000
ROOT = Path(__file__).resolve().parents[2]


class RankFailure(AssertionError):
    """At least one rank failed, died or hung. `rank` is the one that went first; the message shows all of them."""

    def __init__(self, message: str, rank: int, statuses: list[str]) -> None:
        super().__init__(message)
        self.rank = rank
        self.statuses = statuses


class RankPool:
    """A fork server with torch and DeepSpeed imported, begun at the first use (or by `start`), ended by `close`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._folder = ""
        self._is_ready = False

    def start(self) -> None:
        """Begin to import in the background; the first `run_ranks` waits for the end of it."""
        if self._server is not None:
            return
        self._folder = tempfile.mkdtemp(prefix="rank-pool-")
        ours, theirs = Pipe()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(os.path.join(self._folder, "server.log"), "wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-c", "from tests.pool import server; server.main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                # A terminal's Ctrl-C is for pytest; the server ends when its pipe does.
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            )
        theirs.close()
        self._pipe = ours

    def run_ranks(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 60.0,
        deepspeed: bool = False,
        environ: dict[str, str] | None = None,
        backend: str = "gloo",
    ) -> list[Any]:
        """Call `function(*args)` in `world_size` fresh processes and return their results in rank order.

        In each, RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* are set, the default process group is up, the generators of
        Python, NumPy and torch are seeded with 0, and torch uses one thread. With `deepspeed=True` DeepSpeed's own
        `init_distributed` has adopted the group. `function` must be a top-level function of an importable module;
        arguments and results are pickled (tensors by value). `environ` is set on top of the environment.

        Raises: RankFailure with every rank's traceback, or with the stacks of all ranks after `timeout` seconds.
        """
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise ValueError(f"no rank can import {function.__qualname__}: use a top-level function of a module")
        payload = pickle.dumps((function, args))
        pipe = self._ready_pipe()
        folder = tempfile.mkdtemp(prefix="case-", dir=self._folder)
        request = server.Request(
            payload=payload,
            world_size=world_size,
            timeout_s=timeout,
            folder=folder,
            sys_path=[path or os.getcwd() for path in sys.path],
            cwd=os.getcwd(),
            environ=environ or {},
            master_port=_free_port(),
            backend=backend,
            deepspeed=deepspeed,
        )
        try:
            pipe.send_bytes(pickle.dumps(request))
            outcomes = self._answer(pipe, timeout + server.GRACE_AFTER_FAILURE_S + server.STACK_DUMP_S + 30.0)
            if any(outcome.status != "ok" for outcome in outcomes):
                raise _failure(function.__qualname__, outcomes, timeout, folder)
            return [pickle.loads(outcome.value) for outcome in outcomes]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End the server; it takes every rank with it."""
        if self._server is None:
            return
        if self._pipe is not None:
            self._pipe.close()
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._server = self._pipe = None
        self._is_ready = False

    def _ready_pipe(self) -> Connection:
        self.start()
        assert self._pipe is not None
        if not self._is_ready:
            try:
                arrived = self._pipe.poll(START_TIMEOUT_S) and self._pipe.recv() == "ready"
            except EOFError:
                arrived = False
            if not arrived:
                log = self._server_log()
                self.close()
                raise RuntimeError(f"the fork server of the test pool did not start:\n{log}")
            self._is_ready = True
        return self._pipe

    def _answer(self, pipe: Connection, patience_s: float) -> list[server.Outcome]:
        try:
            if pipe.poll(patience_s):
                return pickle.loads(pipe.recv_bytes())
            problem = "does not answer"
        except EOFError:
            problem = "died"
        log = self._server_log()
        self.close()
        raise RuntimeError(f"the fork server of the test pool {problem}:\n{log}")

    def _server_log(self) -> str:
        return Path(self._folder, "server.log").read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]


def _failure(name: str, outcomes: list[server.Outcome], timeout_s: float, folder: str) -> RankFailure:
    bad = [rank for rank, outcome in enumerate(outcomes) if outcome.status != "ok"]
    # What the others say of a rank that died without a word is a consequence, even if it is reported sooner.
    order = {"died": 0, "error": 1}
    bad.sort(key=lambda rank: (order.get(outcomes[rank].status, 2), outcomes[rank].finished))
    lines = [f"{name} on {len(outcomes)} ranks: " + ", ".join(f"rank {r} {o.status}" for r, o in enumerate(outcomes))]
    if outcomes[bad[0]].status == "hang":
        lines[0] += f" (no end after {timeout_s:g} s)"
    for rank in bad:
        outcome = outcomes[rank]
        heading = {
            "error": "raised",
            "died": "died",
            "hang": "hangs here",
            "stopped": "was stopped after another rank failed; it stood here",
        }[outcome.status]
        lines += [f"----- rank {rank} {heading} -----", outcome.text.rstrip()]
        log = Path(folder, f"rank{rank}.log")
        output = log.read_text(errors="replace").strip() if log.exists() else ""
        if output:
            lines += [f"----- rank {rank} wrote -----", output[-LOG_TAIL_CHARACTERS:]]
    return RankFailure("\n".join(lines), bad[0], [outcome.status for outcome in outcomes])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
