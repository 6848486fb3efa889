"""The JSONL log of metrics: always written, and the one that plots and summaries are made from.

One object per record: `step`, `time` (seconds since 1970), `consumed_tokens` where known, and the metrics by name.
It appends, so that a continued run goes on in the same file. What a crashed run had recorded beyond the checkpoint is
first moved to a file beside it, so that every step stands here once, for any reader; where a log was not kept that way,
`read_metrics` lets the later record win. Invariant: at most the last line is torn, and opening for writing removes it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron.common.errors import DataError
from megatron.common.files import atomic_write_text

LOG_NAME = "metrics.jsonl"
# Records of steps that were made again, in the order in which they were replaced.
SUPERSEDED_NAME = "metrics.superseded.jsonl"


class MetricsLog:
    """A sink that appends to a JSONL file; each record reaches the operating system before `record` returns."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock, self._path = clock, path
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

    def go_on_from(self, step: int) -> str | None:
        """Move the records of steps beyond `step` to the file of superseded ones."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        beyond = [line for line in lines if _step_of(line) > step]
        if not beyond:
            return None
        superseded = self._path.with_name(SUPERSEDED_NAME)
        with open(superseded, "ab") as file:
            file.writelines(beyond)
            file.flush()
            os.fsync(file.fileno())
        # One rename, so that a kill in between leaves a whole log: then some records stand in both files.
        atomic_write_text(self._path, b"".join(line for line in lines if _step_of(line) <= step).decode())
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND)
        return (
            f"metrics of steps beyond {step} ({len(beyond)} records of a run that saved no later) moved to {superseded}"
        )

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


def _step_of(line: bytes) -> int:
    """The step of a record; 0 for a line that is none, which is then left where it is."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


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
