"""Errors that ranks report, each shown once, however many ranks report the same.

Knows the form that `megatron.common.errors.run_main` gives an error in a process of several, and no process.
Invariant: every reported text is shown, with all the ranks that reported it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MAX_HOSTS = 4
_FRONT = re.compile(r"\[rank (\d+) on ([^\]]*)\] ?")


@dataclass
class _Report:
    """What one rank says; `shown` counts the lines that the user has seen."""

    host: str
    lines: list[str] = field(default_factory=list)
    shown: int = 0


class ErrorReports:
    """Lines that ranks write about their errors, kept until `show`. May be used from several threads."""

    def __init__(self, world_size: int, on_first: Callable[[], None] = lambda: None) -> None:
        """on_first: called when the first line comes in."""
        self._world_size = world_size
        self._on_first = on_first
        self._lock = threading.Lock()
        self._reports: dict[int, _Report] = {}
        self.first_rank: int | None = None

    def take(self, rank: int, line: str) -> bool:
        """Keep a line that this rank wrote, if it belongs to an error report. Returns whether it does."""
        front = _FRONT.match(line)
        if front is None or int(front[1]) != rank:
            return False
        with self._lock:
            is_first = not self._reports
            if is_first:
                self.first_rank = rank
            report = self._reports.setdefault(rank, _Report(front[2]))
            report.lines.append(line[front.end() :].rstrip("\n"))
        if is_first:
            self._on_first()
        return True

    def has(self, rank: int) -> bool:
        """Whether this rank reported an error."""
        return rank in self._reports

    def show(self, last: int | None = None) -> str:
        """What is new since the last call: each text once, behind the ranks that reported it; or nothing.

        last: this rank's text comes last, and is repeated if others have something new to say after it.
        """
        with self._lock:
            if last in self._reports and any(r.shown < len(r.lines) for n, r in self._reports.items() if n != last):
                self._reports[last].shown = 0
            groups: dict[str, list[int]] = {}
            for rank, report in self._reports.items():
                if report.shown < len(report.lines):
                    text = "\n".join(report.lines[report.shown :])
                    groups.setdefault(text, []).append(rank)
                    report.shown = len(report.lines)
        shown = sorted(groups.items(), key=lambda group: last in group[1])
        return "".join(f"[{self._name(ranks)} on {self._hosts(ranks)}] {text}\n" for text, ranks in shown)

    def _hosts(self, ranks: list[int]) -> str:
        hosts = list(dict.fromkeys(self._reports[rank].host for rank in ranks))
        return ", ".join(hosts) if len(hosts) <= MAX_HOSTS else f"{len(hosts)} hosts"

    def _name(self, ranks: list[int]) -> str:
        if len(ranks) == 1:
            return f"rank {ranks[0]}"
        return f"all {len(ranks)} ranks" if len(ranks) == self._world_size else f"ranks {shown_ranks(ranks)}"


def shown_ranks(ranks: Iterable[int]) -> str:
    """Ranks in order, neighbours joined: `0, 2-5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
