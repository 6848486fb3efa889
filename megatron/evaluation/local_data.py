"""Data of our own tasks, read from where prepare_data.py put it.

Named by the tasks' YAML files (`!function`); lm-eval calls it with the task's metadata and dataset_kwargs.
Invariant: nothing is fetched and nothing is copied into a cache.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets

from megatron.common.errors import DataError

PROJECT = Path(__file__).resolve().parents[2]


def jsonl(file: str, data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows of a JSONL file as the split "test". Raises: DataError if it is missing, empty or damaged."""
    path = find(file, data_dir)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}. Make the file anew: {_HOW}") from error
    if not rows:
        raise DataError(f"{path} is empty. Make it anew: {_HOW}")
    return {"test": datasets.Dataset.from_list(rows)}


def find(file: str, data_dir: str | None = None) -> Path:
    """The absolute path of `file` in `data_dir`, or else in DATA_DIR, ./data or the project's data folder.

    Raises: DataError naming the places tried.
    """
    if data_dir:
        places = [Path(data_dir)]
    elif os.environ.get("DATA_DIR"):
        places = [Path(os.environ["DATA_DIR"])]
    else:
        places = [Path("data"), PROJECT / "data"]
    candidates = list(dict.fromkeys((place / file).resolve() for place in places))
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(
        f"the evaluation data {file} is missing; tried {' and '.join(map(str, candidates))}. "
        f"Make it with: {_HOW} (or set DATA_DIR to the folder that holds it)."
    )


_HOW = "python prepare_data.py stdlib -d data"
