"""One place to hand metrics to; it passes them on to every sink.

It computes nothing and knows no metric by name. Invariant: a sink that may fail for reasons outside the run (a remote
logger) can never stop the run: it is told off once and left out from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where metrics go."""

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None) -> None:
        """Take the metrics of a step; several records of one step complete each other."""

    def go_on_from(self, step: int) -> str | None:
        """Take back what was recorded of steps beyond `step`: they are made again. Returns what to say of it."""

    def close(self) -> None:
        """Write what is still held back, and let go."""


class Recorder:
    """Passes every record to all sinks; without sinks it does nothing, which is what ranks other than 0 want."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None = None) -> None:
        """Record metrics under upstream's names (`train/lm_loss`, `validation/lm_loss`, `runtime/tokens_per_sec`, ...).

        Units: `step` optimizer steps; `consumed_tokens` all tokens trained on so far, over all ranks.
        """
        for sink in self._sinks:
            sink.record(step, metrics, consumed_tokens)

    def go_on_from(self, step: int) -> str:
        """Take back, in every sink that can, what was recorded of steps beyond `step`: they are made again.

        Called when a run continues from a checkpoint, before its first record. Returns what to say of it, or "".
        """
        return "; ".join(filter(None, [sink.go_on_from(step) for sink in self._sinks]))

    def close(self) -> None:
        """Close every sink; a second call does nothing."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()


class ForgivingSink:
    """Wraps a sink whose failures must not matter: the first one is said, then the sink is left out."""

    def __init__(self, sink: Sink, name: str, say: Callable[[str], None] = _log.warning) -> None:
        self._sink: Sink | None = sink
        self._name = name
        self._say = say

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None) -> None:
        """Pass the record on, unless the sink has failed before."""
        if self._sink is None:
            return
        try:
            self._sink.record(step, metrics, consumed_tokens)
        except Exception as error:
            self._give_up(step, error)

    def go_on_from(self, step: int) -> str | None:
        """Pass it on, unless the sink has failed before."""
        if self._sink is None:
            return None
        try:
            return self._sink.go_on_from(step)
        except Exception as error:
            self._give_up(step, error)
            return None

    def _give_up(self, step: int, error: Exception) -> None:
        self._sink = None
        self._say(
            f"{self._name} failed at step {step} and is left out from here on; training goes on, and the JSONL log "
            f"has every metric. It said: {type(error).__name__}: {error}"
        )

    def close(self) -> None:
        """Close the sink, unless it has failed before."""
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            sink.close()
        except Exception as error:
            self._say(f"{self._name} could not be closed: {type(error).__name__}: {error}")
