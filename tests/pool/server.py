"""The fork server: imports the heavy libraries once, then forks the ranks of each case and watches over them.

`tests.pool.pool` starts `main` in a new interpreter, with the descriptor of its end of a duplex pipe. It decides when a
case has failed or hangs; it does not decide what that means for the test.
Invariant: when it answers, or when its client goes away, no process of the case is alive any more.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_AFTER_FAILURE_S = 3.0
"""How long the other ranks may go on after one has failed: enough for them to notice, and to report themselves."""

STACK_DUMP_S = 2.0
"""How long a hanging rank gets to write its stacks before it is killed."""


@dataclass
class Request:
    """One case: `payload` is the pickled `(function, args)`; `folder` holds logs, stacks and the rendezvous file."""

    payload: bytes
    world_size: int
    timeout_s: float
    folder: str
    sys_path: list[str]
    cwd: str
    environ: dict[str, str]
    master_port: int
    backend: str
    deepspeed: bool


@dataclass
class Outcome:
    """How one rank ended: `status` is ok, error (an exception), died (no word from it), hang, or stopped (by us)."""

    status: str
    value: bytes = b""
    text: str = ""
    finished: float = field(default_factory=time.monotonic)


@dataclass
class Rank:
    """A running rank as the server sees it."""

    pid: int
    pipe: Connection
    outcome: Outcome | None = None


def main() -> None:
    """Serve cases one after another until the client closes the pipe."""
    client = Connection(int(sys.argv[1]))
    import tests.pool.preload  # noqa: F401 - before the first fork, and only in this process

    gc.collect()
    gc.freeze()
    client.send("ready")
    while True:
        try:
            request: Request = pickle.loads(client.recv_bytes())
        except EOFError:
            return
        outcomes = _serve(request, client)
        if outcomes is None:
            return
        client.send_bytes(pickle.dumps(outcomes))


def _serve(request: Request, client: Connection) -> list[Outcome] | None:
    """Run one case to its end; None when the client has gone."""
    ranks: list[Rank] = []
    try:
        for number in range(request.world_size):
            ranks.append(_fork(number, request, client))
        if not _watch(ranks, request, client):
            return None
        for rank in ranks:
            # Only now may a rank exit: one that leaves early resets connections that its peers still read from.
            with contextlib.suppress(OSError):
                rank.pipe.send_bytes(b"leave")
        _await_exits(ranks)
        return [rank.outcome for rank in ranks if rank.outcome is not None]
    finally:
        for rank in ranks:
            # A rank leads its own process group, so this also reaches what it started itself, and nothing else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(rank.pid, 0)
            rank.pipe.close()


def _watch(ranks: list[Rank], request: Request, client: Connection) -> bool:
    """Wait until every rank has an outcome; False when the client has gone."""
    deadline = time.monotonic() + request.timeout_s
    failed = False
    while pending := [rank for rank in ranks if rank.outcome is None]:
        ready = wait([client, *(rank.pipe for rank in pending)], timeout=max(0.0, deadline - time.monotonic()))
        if client in ready:
            return False
        for rank in pending:
            if rank.pipe in ready:
                rank.outcome = _receive(rank)
                if rank.outcome.status != "ok" and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE_S)
        if not ready:
            status = "stopped" if failed else "hang"
            stacks = _stacks(pending, [r for r in range(len(ranks)) if ranks[r].outcome is None], request.folder)
            for rank, text in zip(pending, stacks, strict=True):
                rank.outcome = Outcome(status, text=text)
    return True


def _receive(rank: Rank) -> Outcome:
    try:
        return pickle.loads(rank.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        _, status = os.waitpid(rank.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome("died", text=f"the process ended with {how} and returned nothing")


def _stacks(pending: list[Rank], numbers: list[int], folder: str) -> list[str]:
    for rank in pending:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGUSR1)
    texts: list[str] = []
    deadline = time.monotonic() + STACK_DUMP_S
    for number in numbers:
        path = Path(folder, f"rank{number}.stack")
        text, seen = "", -1
        # Complete when it has stopped growing; the writer is a signal handler and cannot tell us.
        while time.monotonic() < deadline and (not text or len(text) != seen):
            seen = len(text)
            time.sleep(0.05)
            text = path.read_text() if path.exists() else ""
        texts.append(text or "(no stack: the process did not answer)")
    return texts


def _await_exits(ranks: list[Rank]) -> None:
    deadline = time.monotonic() + 1.0
    for rank in ranks:
        wait([rank.pipe], timeout=max(0.0, deadline - time.monotonic()))  # ready when the process has closed its end


def _fork(rank: int, request: Request, client: Connection) -> Rank:
    ours, theirs = Pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            client.close()
            ours.close()
            _run_rank(rank, request, theirs)
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    return Rank(pid, ours)


def _run_rank(rank: int, request: Request, pipe: Connection) -> None:
    import faulthandler
    import traceback

    os.setsid()
    log = os.open(os.path.join(request.folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # A bare descriptor, open for the life of the process: the handler writes to it.
    stacks = os.open(os.path.join(request.folder, f"rank{rank}.stack"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=False)
    try:
        outcome = Outcome("ok", value=pickle.dumps(_call(rank, request)))
    except BaseException as error:  # includes SystemExit and pytest's outcomes: a rank must always report
        outcome = Outcome("error", text="".join(traceback.format_exception(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    outcome.finished = time.monotonic()
    pipe.send_bytes(pickle.dumps(outcome))
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()


def _call(rank: int, request: Request) -> Any:
    import random
    from datetime import timedelta

    import numpy
    import torch

    os.chdir(request.cwd)
    sys.path[:] = request.sys_path
    os.environ.update(request.environ)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request.world_size),
        LOCAL_WORLD_SIZE=str(request.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(request.master_port),
    )
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    function, args = pickle.loads(request.payload)
    torch.distributed.init_process_group(
        request.backend,
        init_method=f"file://{request.folder}/rendezvous",
        rank=rank,
        world_size=request.world_size,
        timeout=timedelta(seconds=max(60.0, 2 * request.timeout_s)),
    )
    if request.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend=request.backend, dist_init_required=False)
    return function(*args)
