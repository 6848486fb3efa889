"""Run the ranks of one host, pass on their output and signals, and leave nothing behind.

Knows no configuration. Rank 0 writes straight to the terminal; the other ranks' lines go to stderr with `[rank N]` in
front; errors that ranks report are kept a moment, so that one that all of them report is shown once.
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
from collections.abc import Sequence
from types import FrameType
from typing import IO

from megatron.launch.commands import RankCommand
from megatron.launch.error_reports import ErrorReports

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# After the first failure: time for the others to fail by themselves, then to end on SIGTERM, before SIGKILL.
OWN_END_S, TERM_S = 1.0, 5.0
# A rank that reported an error and does not end: how long the others have to report the same.
REPORT_S = 2.0
# What ranks started may hold their output open.
LAST_LINES_S = 1.0
LAST_WORDS_LINES = 30
_PR_SET_PDEATHSIG = 1


class _Rank:
    """One child process, the threads that read its output, and its last lines."""

    def __init__(self, command: RankCommand, shares_group: bool, reports: ErrorReports) -> None:
        self.number = command.rank
        self.reports = reports
        self.shares_group = shares_group
        self.last_words: collections.deque[str] = collections.deque(maxlen=LAST_WORDS_LINES)
        first = self.number == 0
        self.process = subprocess.Popen(
            command.arguments,
            env={**os.environ, **command.added, "MEGATRON_PARENT_PID": str(os.getpid())},
            stdin=None if first else subprocess.DEVNULL,
            stdout=None if first else subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=None if shares_group else 0,
            preexec_fn=_die_with_parent,
        )
        self.readers: list[threading.Thread] = []

    def start_reading(self) -> None:
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                reader = threading.Thread(target=self._pass_on, args=(stream,), daemon=True)
                reader.start()
                self.readers.append(reader)

    def _pass_on(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace")
            if stream is self.process.stderr:
                if self.reports.take(self.number, line):
                    continue
                self.last_words.append(line)
            if self.number:
                line = f"[rank {self.number}] {line}"
            _print(line)

    def send(self, number: int) -> None:
        """Send a signal to the rank and what it started."""
        with contextlib.suppress(ProcessLookupError):
            if self.shares_group:
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)


def run_ranks(commands: Sequence[RankCommand]) -> int:
    """Run all ranks to their end.

    Returns the exit code: 0, or that of the rank that failed first (128 + n for one that signal n ended).
    """
    ended: queue.Queue[_Rank | None] = queue.Queue()
    reports = ErrorReports(len(commands), on_first=lambda: ended.put(None))
    ranks: list[_Rank] = []
    previous = {number: signal.signal(number, _forwarder(ranks)) for number in FORWARDED}
    # Only a rank in our own process group may read from the terminal, and Ctrl-C then reaches it without us.
    at_terminal = _is_foreground()
    try:
        for command in commands:
            ranks.append(_Rank(command, at_terminal and command.rank == 0, reports))
        for rank in ranks:
            rank.start_reading()
            threading.Thread(target=_wait, args=(rank, ended), daemon=True).start()
        return _supervise(ranks, ended, reports)
    finally:
        for rank in ranks:
            if rank.process.poll() is None or not rank.shares_group:
                rank.send(signal.SIGKILL)
            rank.process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _supervise(ranks: list[_Rank], ended: queue.Queue[_Rank | None], reports: ErrorReports) -> int:
    """`ended` gives each rank as it ends, and None when the first error is reported."""
    running = set(ranks)
    failed: _Rank | None = None
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
            if rank.process.returncode != 0 and failed is None:
                failed = rank
                steps += [(now + OWN_END_S, signal.SIGTERM), (now + OWN_END_S + TERM_S, signal.SIGKILL)]
        steps.sort(key=lambda step: step[0])
    deadline = time.monotonic() + LAST_LINES_S
    for reader in (reader for rank in ranks for reader in rank.readers):
        reader.join(timeout=max(0.0, deadline - time.monotonic()))
    _print(reports.show())
    if failed is None:
        return 0
    code = failed.process.returncode
    _report(failed, code)
    return 128 - code if code < 0 else code


def _report(failed: _Rank, code: int) -> None:
    if code > 128 or -code in (signal.SIGINT, signal.SIGTERM):
        # Ended on request: the rank has said what there is to say.
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    words = "" if failed.reports.has(failed.number) else "".join(failed.last_words).strip()
    _print(
        f"\nrank {failed.number} {how}, the first to do so." + (f" Its last words:\n{words}" if words else "") + "\n"
    )


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _forwarder(ranks: list[_Rank]):  # type: ignore[no-untyped-def]
    seen: collections.Counter[int] = collections.Counter()

    def forward(number: int, frame: FrameType | None) -> None:
        seen[number] += 1
        # Whoever asks a third time means it.
        insists = number in (signal.SIGINT, signal.SIGTERM) and seen[number] >= 3
        for rank in ranks:
            if number == signal.SIGINT and rank.shares_group and not insists:
                continue
            rank.send(signal.SIGKILL if insists else number)

    return forward


def _wait(rank: _Rank, ended: queue.Queue[_Rank | None]) -> None:
    rank.process.wait()
    ended.put(rank)


def _is_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):
        return False


def _die_with_parent() -> None:
    """In the child, before it runs: let the kernel end it when the launcher dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
