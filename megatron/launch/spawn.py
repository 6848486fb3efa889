"""Run the ranks of a run, pass on their output and signals, and leave nothing behind.

Knows no configuration, and other hosts only as ranks that it can signal and that end (`megatron.launch.team`). Rank 0
writes straight to the terminal; the other ranks' lines go to stderr with `[rank N]` in front; errors that ranks report
are kept a moment, so that one that all of them report is shown once.
Invariant: when `run_ranks` returns or this process dies, by whatever signal, no rank is running any more.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Protocol

from megatron.launch.commands import RankCommand
from megatron.launch.error_reports import ErrorReports
from megatron.launch.stopping import EXIT_GRACE_MINS, Stopping

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# After the first failure: time for the others to fail by themselves, then to end on SIGTERM, before SIGKILL.
OWN_END_S, TERM_S = 1.0, 5.0
# A rank that reported an error and does not end: how long the others have to report the same.
REPORT_S = 2.0
# What ranks started may hold their output open.
LAST_LINES_S = 1.0
LAST_WORDS_LINES = 30
_PR_SET_PDEATHSIG = 1


class RankProcess(Protocol):
    """What is asked of a rank's process, here or on another host, as of subprocess.Popen."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Rank:
    """One rank: what is done with its output, and its last lines. host: where it runs, if not here."""

    process: RankProcess
    shares_group = False

    def __init__(self, number: int, reports: ErrorReports, host: str | None = None) -> None:
        self.number = number
        self.reports = reports
        self.last_words: collections.deque[str] = collections.deque(maxlen=LAST_WORDS_LINES)
        self.readers: list[threading.Thread] = []
        self.name = f"rank {number}" + (f" on {host}" if host else "")

    def start_reading(self) -> None:
        """Pass on what the rank writes from now on."""

    def send(self, number: int) -> None:
        """Send a signal to the rank and what it started."""
        raise NotImplementedError

    def take(self, line: str, is_error: bool) -> None:
        """A line that the rank wrote."""
        if is_error:
            if self.reports.take(self.number, line):
                return
            self.last_words.append(line)
        _print(f"[{self.name}] {line}" if self.number else line)


class LocalRank(Rank):
    """A child of this process, and the threads that read its output."""

    def __init__(self, command: RankCommand, shares_group: bool, reports: ErrorReports, host: str | None) -> None:
        super().__init__(command.rank, reports, host)
        self.shares_group = shares_group
        self.process = self.child = start_process(command, is_first=self.number == 0, shares_group=shares_group)

    def start_reading(self) -> None:
        self.readers = read_output(self.child, self.take)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.shares_group:
                self.child.send_signal(number)
            else:
                os.killpg(self.child.pid, number)


def start_process(command: RankCommand, *, is_first: bool, shares_group: bool = False) -> subprocess.Popen[bytes]:
    """Start a rank; it ends when this process does. The first one writes to this process's own output."""
    return subprocess.Popen(
        command.arguments,
        env={**os.environ, **command.added, "MEGATRON_PARENT_PID": str(os.getpid())},
        stdin=None if is_first else subprocess.DEVNULL,
        stdout=None if is_first else subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=None if shares_group else 0,
        preexec_fn=die_with_parent,
    )


def read_output(process: subprocess.Popen[bytes], take: Callable[[str, bool], None]) -> list[threading.Thread]:
    """Threads that give `take` every line that the process writes to its pipes, and whether it came from stderr."""

    def pass_on(stream: IO[bytes]) -> None:
        for raw in stream:
            take(raw.decode("utf-8", "replace"), stream is process.stderr)

    readers = [
        threading.Thread(target=pass_on, args=(stream,), daemon=True)
        for stream in (process.stdout, process.stderr)
        if stream is not None
    ]
    for reader in readers:
        reader.start()
    return readers


def run_ranks(
    commands: Sequence[RankCommand],
    start_elsewhere: Callable[[RankCommand, ErrorReports], Rank] | None = None,
    *,
    grace_mins: float = EXIT_GRACE_MINS,
) -> int:
    """Run all ranks to their end.

    start_elsewhere: starts the ranks of other hosts, those whose command has a node other than 0; the host then stands
    in front of every line. grace_mins: how long ranks that were asked to stop may take (exit_grace_in_mins).

    Returns the exit code: 0, or that of the rank that failed first (128 + n for one that signal n ended), or 128 + n
    when signal n asked the run to stop.
    """
    ended: queue.Queue[Rank | None] = queue.Queue()
    reports = ErrorReports(len(commands), on_first=lambda: ended.put(None))
    ranks: list[Rank] = []
    here = os.uname().nodename if start_elsewhere is not None else None
    stopping = Stopping(ranks, grace_mins)
    previous = {number: signal.signal(number, stopping) for number in FORWARDED}
    # Only a rank in our own process group may read from the terminal, and Ctrl-C then reaches it without us.
    at_terminal = _is_foreground()
    try:
        for command in commands:
            if command.node and start_elsewhere is not None:
                ranks.append(start_elsewhere(command, reports))
            else:
                ranks.append(LocalRank(command, at_terminal and command.rank == 0, reports, here))
        for rank in ranks:
            rank.start_reading()
            threading.Thread(target=_wait, args=(rank, ended), daemon=True).start()
        return _supervise(ranks, ended, reports, stopping)
    finally:
        stopping.close()
        for rank in ranks:
            if rank.process.poll() is None or not rank.shares_group:
                rank.send(signal.SIGKILL)
            rank.process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _supervise(ranks: list[Rank], ended: queue.Queue[Rank | None], reports: ErrorReports, stopping: Stopping) -> int:
    """`ended` gives each rank as it ends, and None when the first error is reported."""
    running = set(ranks)
    failed: Rank | None = None
    # What is to happen when; None stands for showing the reports.
    steps: list[tuple[float, int | None]] = []
    while running:
        timeout = max(0.0, steps[0][0] - time.monotonic()) if steps else None
        try:
            rank = ended.get(timeout=timeout)
        except queue.Empty:
            number = steps.pop(0)[1]
            if number is None:
                _print(reports.show())
                continue
            for other in running:
                other.send(number)
            continue
        now = time.monotonic()
        if rank is None:
            steps.append((now + REPORT_S, None))
        else:
            running.discard(rank)
            code = rank.process.returncode or 0
            if code != 0 and failed is None and not stopping.is_stop(code):
                failed = rank
                steps += [(now + OWN_END_S, signal.SIGTERM), (now + OWN_END_S + TERM_S, signal.SIGKILL)]
        steps.sort(key=lambda step: step[0])
    deadline = time.monotonic() + LAST_LINES_S
    for reader in (reader for rank in ranks for reader in rank.readers):
        reader.join(timeout=max(0.0, deadline - time.monotonic()))
    if failed is None:
        _print(reports.show())
        return stopping.exit_code
    # A rank that said what is wrong and took its time to end came before one that had merely lost it.
    spoke = next((rank for rank in ranks if rank.number == reports.first_rank), failed)
    if (spoke.process.returncode or 0) > 0:
        failed = spoke
    _print(reports.show(last=failed.number))
    code = failed.process.returncode or 0
    _report(failed, code)
    return 128 - code if code < 0 else code


def _report(failed: Rank, code: int) -> None:
    if code > 128 or -code in (signal.SIGINT, signal.SIGTERM):
        # Ended on request: the rank has said what there is to say.
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    hint = " The system does that where memory runs out." if code == -signal.SIGKILL else ""
    words = "" if failed.reports.has(failed.number) else "".join(failed.last_words).strip()
    _print(f"\n{failed.name} {how}, the first to do so.{hint}" + (f" Its last words:\n{words}" if words else "") + "\n")


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _wait(rank: Rank, ended: queue.Queue[Rank | None]) -> None:
    rank.process.wait()
    ended.put(rank)


def _is_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """In a child, before it runs: let the kernel end it when its parent dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
