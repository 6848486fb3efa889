"""What is done with lm-eval's results: flat metrics for logs, a table for people, a file for both.

Invariant: the file holds everything that the table and the metrics show.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.common.files import atomic_write_text


def _rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error or None); a filter other than "none" is part of the metric's name."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else f"{metric}_{filter_name}"
            yield task, name, float(value), stderr if isinstance(stderr, int | float) else None


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """{"<task>_<metric>": value}, upstream's names without the "eval/" or "validation/" before them."""
    return {f"{task}_{metric}": value for task, metric, value, _ in _rows(results)}


def table(results: Mapping[str, Any]) -> str:
    """The scores in aligned columns."""
    counts = results.get("n-samples", {})
    lines = [("task", "metric", "value", "stderr", "documents")]
    for task, metric, value, stderr in _rows(results):
        documents = counts.get(task, {}).get("effective", "")
        lines.append((task, metric, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}", str(documents)))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write(results: Mapping[str, Any], prefix: str = "") -> Path:
    """Write `[prefix_]eval_results_<time>.json` (upstream's name) in the working directory; an old file is kept."""
    stem = f"{prefix}_" if prefix else ""
    stem += f"eval_results_{time.strftime('%m-%d-%Y-%H-%M-%S')}"
    path, number = Path(f"{stem}.json"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}.json")
    atomic_write_text(path, json.dumps(results, indent=2, ensure_ascii=False))
    return path
