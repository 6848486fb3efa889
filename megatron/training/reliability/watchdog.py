"""The hang watchdog: when no rank has made progress for too long, tell where each of them is, and end with code 7.

Two threads per rank. One exchanges a small status with the other ranks over the job's rendezvous store, on a connection
of its own: never over the collectives, which may be what hangs. The other looks at the clock, and is never held up by
the first. Each rank thus finds out by itself, whatever its main thread is stuck in. Invariant: as long as any rank that
answers makes progress, nobody is ended.

A rank that holds the interpreter's lock in foreign code, or is stopped, does not answer; the others name it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Protocol

import torch.distributed as dist

from megatron.common import heartbeat
from megatron.common.errors import WatchdogError

# Looks per timeout, and the longest pause between two.
_LOOKS, _LONGEST_PAUSE_S = 12, 5.0
# A rank that says nothing for so many pauses, and at least so long, does not answer.
_SILENT_PAUSES, _SILENT_S = 3, 1.0
# Frames of the main thread within these are a wait for other ranks.
_WAITING = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))


def start_watchdog(timeout_s: float) -> Watchdog | None:
    """Watch this job for hangs from here on; None where the key is 0. Needs torch.distributed to be started."""
    if not timeout_s:
        return None
    several = dist.get_world_size() > 1
    # A connection of its own: a rank that waits in the store holds the common one.
    store = dist.distributed_c10d._get_default_store().clone() if several else None  # type: ignore[attr-defined]
    watchdog = Watchdog(timeout_s, dist.get_rank(), dist.get_world_size(), store)
    watchdog.start()
    return watchdog


class Store(Protocol):
    """What the watchdog needs of torch.distributed's rendezvous store."""

    def set(self, key: str, value: str) -> object: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass
class Status:
    """What a rank tells the others. number: of this message. age_s: since its last sign of life."""

    rank: int
    host: str
    number: int = 0
    age_s: float = 0.0
    place: str = ""
    num_places: int = 0
    waits: bool = False
    has_fired: bool = False


@dataclass
class _Seen:
    """A rank's newest status, and when this rank first saw it."""

    status: Status
    at: float


class Watchdog:
    """One per rank. `start` it once the store is there; `stop` it when the run is over.

    timeout_s: without progress of any rank. end: how the process is ended.
    """

    def __init__(
        self,
        timeout_s: float,
        rank: int,
        world_size: int,
        store: Store | None = None,
        *,
        stream: IO[str] | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.timeout_s, self.rank, self.world_size = timeout_s, rank, world_size
        self.pause_s = min(timeout_s / _LOOKS, _LONGEST_PAUSE_S)
        self.silent_s = max(_SILENT_PAUSES * self.pause_s, _SILENT_S)
        self._store, self._stream, self._end = store, stream, end
        self._own = Status(rank, os.uname().nodename)
        self._main = threading.main_thread().ident
        self._seen: dict[int, _Seen] = {}
        self._exchanged_at = time.monotonic()
        self._looked_at = time.monotonic()
        self._resumed_at = 0.0
        self._wants_others = False
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        heartbeat.beat()
        self._update(time.monotonic())
        if self._store is not None:
            # Now, so that a rank that stops before its first exchange is known by its host.
            self._publish(self._store)
        for name, work in (("watchdog", self._watch), ("watchdog-exchange", self._exchange)):
            if work == self._watch or self._store is not None:
                threading.Thread(target=work, name=name, daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()

    # ---- the thread that looks at the clock

    def _watch(self) -> None:
        self._looked_at = time.monotonic()
        while not self._is_over.wait(self.pause_s):
            now = time.monotonic()
            self._note_look(now)
            self._arm()
            self._update(now)
            if self._own.age_s < self.timeout_s / 2:
                self._wants_others = False
                continue
            self._wants_others = True
            others_fired = any(seen.status.has_fired for seen in self._seen.values())
            if others_fired or (self._own.age_s >= self.timeout_s and not self._anyone_progresses(now)):
                self._fire()
                return

    def _note_look(self, now: float) -> None:
        if now - self._looked_at > self.silent_s + self.pause_s:
            # This process was stopped, or its lock was held: how long it has been idle is not known.
            self._resumed_at = now
        self._looked_at = now

    def _arm(self) -> None:
        # If even this thread cannot run, the interpreter's own timer, which needs no lock, shows the stacks.
        faulthandler.dump_traceback_later(self.timeout_s + self.silent_s, file=self._stream or sys.stderr)

    def _update(self, now: float) -> None:
        last = heartbeat.last()
        self._own.age_s = now - max(last.at, self._resumed_at)
        self._own.place, self._own.num_places = last.place, last.num_places
        if self._own.age_s >= self.timeout_s / 2:
            self._own.waits = self._is_waiting()

    def _anyone_progresses(self, now: float) -> bool:
        # Another rank's age is what it said, and what has gone by since.
        return any(
            now - seen.at <= self.silent_s and seen.status.age_s + now - seen.at < self.timeout_s - 2 * self.pause_s
            for rank, seen in list(self._seen.items())
            if rank != self.rank
        )

    def _is_waiting(self) -> bool:
        frame = sys._current_frames().get(self._main or 0)
        for _ in range(8):
            if frame is None:
                return False
            if any(part in frame.f_code.co_filename for part in _WAITING):
                return True
            frame = frame.f_back
        return False

    def _fire(self) -> None:
        heartbeat.ending.set()
        self._own.has_fired = True
        self._own.waits = self._is_waiting()
        stacks = _stacks()
        # Time for every rank that can to say where it is, so that all know the same.
        self._is_over.wait(self.silent_s + 2 * self.pause_s)
        faulthandler.cancel_dump_traceback_later()
        now = time.monotonic()
        if self._speaks(now):
            self._tell(f"error: {self._conclusion(now)}")
        self._tell(stacks)
        # Others may still be reading from the store that rank 0 holds.
        time.sleep(self.pause_s if self.rank == 0 else 0.0)
        self._end(WatchdogError.exit_code)

    def _speaks(self, now: float) -> bool:
        """One rank is enough to tell the conclusion: the first that answers, or everyone who hears of nobody."""
        if not self._hears(now):
            return True
        return self.rank == min({self.rank, *self._answering(now)})

    def _hears(self, now: float) -> bool:
        return self._store is None or now - self._exchanged_at <= self.silent_s

    def _answering(self, now: float) -> list[int]:
        return [rank for rank, seen in self._seen.items() if now - seen.at <= self.silent_s]

    def _conclusion(self, now: float) -> str:
        known = {rank: seen.status for rank, seen in self._seen.items()} | {self.rank: self._own}
        answering = {rank: known[rank] for rank in {self.rank, *self._answering(now)}}
        if not self._hears(now):
            who = (
                "the rendezvous store, which rank 0's process (or the launcher) holds, does not answer either: it is "
                "stopped or dead, or its host cannot be reached"
            )
        else:
            who = missing(answering, known, self.world_size)
        return (
            f"no rank has made progress for {self.timeout_s:g} s (watchdog_timeout_s): {who}. This rank is at "
            f"{self._own.place!r}. The stacks of the ranks that answer follow."
        )

    def _tell(self, text: str) -> None:
        front = f"[rank {self.rank} on {self._own.host}] "
        stream = self._stream or sys.stderr
        stream.write("".join(f"{front}{line}\n" for line in text.rstrip("\n").split("\n")))
        stream.flush()

    # ---- the thread that exchanges

    def _exchange(self) -> None:
        assert self._store is not None
        while not self._is_over.wait(self.pause_s / 2):
            try:
                self._publish(self._store)
                if self._wants_others:
                    for rank in range(self.world_size):
                        self._look_at(rank)
                self._exchanged_at = time.monotonic()
            except (RuntimeError, OSError, ValueError):
                # The store is gone or answers too late: the other thread sees that by the time.
                continue

    def _publish(self, store: Store) -> None:
        self._own.number += 1
        store.set(_key(self.rank), json.dumps(asdict(self._own)))

    def _look_at(self, rank: int) -> None:
        assert self._store is not None
        # Asked for first: getting what nobody has set waits for it.
        if not self._store.check([_key(rank)]):
            return
        status = Status(**json.loads(self._store.get(_key(rank))))
        seen = self._seen.get(rank)
        if seen is None or seen.status.number != status.number:
            self._seen[rank] = _Seen(status, time.monotonic())


def missing(answering: dict[int, Status], known: dict[int, Status], world_size: int) -> str:
    """Which ranks the others wait for, in words. known: every status ever seen, answering: the present ones."""
    silent = [rank for rank in range(world_size) if rank not in answering]
    if silent:
        places = {known[rank].place for rank in silent if rank in known}
        where = f", last seen at {_either(places)}" if places else ""
        return (
            f"{_ranks(silent, known)} {_verb(silent, 'does', 'do')} not answer{where}: stopped, dead, stuck in code "
            "that never lets Python go on, or on a host that cannot be reached"
        )
    furthest = max(status.num_places for status in answering.values())
    behind = [rank for rank, status in answering.items() if status.num_places < furthest]
    if behind:
        places = {answering[rank].place for rank in behind}
        there = {status.place for status in answering.values() if status.num_places == furthest}
        return (
            f"{_ranks(behind, known)} {_verb(behind, 'has', 'have')} not come further than {_either(places)}; the "
            f"others wait at {_either(there)}"
        )
    working = [rank for rank, status in answering.items() if not status.waits]
    if len(working) < len(answering) and working:
        return (
            f"{_ranks(working, known)} {_verb(working, 'is', 'are')} not in a collective operation, in which the "
            "others wait"
        )
    return f"all {world_size} ranks are at the same place" if world_size > 1 else "there is no other rank"


def _key(rank: int) -> str:
    return f"megatron-watchdog/{rank}"


def _ranks(ranks: list[int], known: dict[int, Status]) -> str:
    shown = [f"{rank} (on {known[rank].host})" if rank in known else str(rank) for rank in sorted(ranks)[:16]]
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{more}"


def _verb(ranks: list[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def _either(places: set[str]) -> str:
    return " or ".join(repr(place) for place in sorted(places))


def _stacks() -> str:
    """The stacks of all threads but the watchdog's own, the main thread's first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        threads = file.read().strip().split("\n\n")
    shown = [thread for thread in threads if f'"{__file__}"' not in thread]
    return "Python stacks of this rank, innermost call first:\n" + "\n".join(reversed(shown))
