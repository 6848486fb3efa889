"""The JSONL log of metrics: always written, and the one that plots and summaries are made from.

One object per record: `step`, `time` (seconds since 1970), `consumed_tokens` where known, and the metrics by name.
It appends, so that a continued run goes on in the same file. Steps that were repeated after a crash stand there twice;
the reader lets the later one win. Invariant: at most the last line is torn, and opening for writing removes it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron.common.errors import DataError

LOG_NAME = "metrics.jsonl"


class MetricsLog:
    """A sink that appends to a JSONL file; each record reaches the operating system before `record` returns."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        _remove_torn_line(self._fd)

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None) -> None:
        """Append one line."""
        entry: dict[str, object] = {"step": step, "time": round(self._clock(), 3)}
        if consumed_tokens is not None:
            entry["consumed_tokens"] = consumed_tokens
        # JSON has no NaN and no infinity: they are written as strings that Python's float() and most readers take.
        entry.update({name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()})
        os.write(self._fd, (json.dumps(entry, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """All metrics by step, in the order of steps; where a step was recorded again, the later value of a metric wins.

    `time` and `consumed_tokens` are among the metrics. A torn last line (the run was killed while writing) is ignored.
    Raises: DataError if the file is missing, or a line other than the last is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no metrics log. A training run writes {LOG_NAME} into its log_dir."
        ) from None
    steps: dict[int, dict[str, float]] = {}
    # What stands after the last newline is either nothing or torn.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
            values = {name: float(value) for name, value in entry.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path}:{number}: not a record of a metrics log: {line[:80].decode(errors='replace')!r}. "
                "Give a file that a training run wrote, or remove the line."
            ) from None
        steps.setdefault(step, {}).update(values)
    return dict(sorted(steps.items()))


def _remove_torn_line(fd: int) -> None:
    end = os.fstat(fd).st_size
    position = end
    while position > 0:
        start = max(0, position - 4096)
        newline = os.pread(fd, position - start, start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != end:
        os.ftruncate(fd, position)
