"""What a token file pair was made from, noted beside it, so that a second run can tell whether it is still right.

Invariant: `{prefix}.source.json` is written after the pair, so it never describes a pair that is not complete.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron.common.documents import find_inputs
from megatron.common.files import atomic_write_text
from megatron.data.preprocess import PreprocessJob, written_pairs


def describe_job(job: PreprocessJob, tokenizer_fingerprint: str) -> dict[str, object]:
    """Everything that decides the bytes a job writes."""
    inputs = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in find_inputs(job.inputs)]
    return {
        "inputs": [list(entry) for entry in inputs],
        "keys": list(job.keys),
        "append_eod": job.append_eod,
        "ftfy": job.fix_text,
        "tokenizer": tokenizer_fingerprint,
    }


def is_up_to_date(job: PreprocessJob, description: dict[str, object]) -> bool:
    """Whether the job's output is there and was made as `description` says."""
    if not all(file.is_file() for file in written_pairs(job)):
        return False
    return all(_read(note) == {**description, "written": _written(job)} for note in _notes(job))


def record_job(job: PreprocessJob, description: dict[str, object]) -> None:
    """Note beside each pair what it was made from."""
    for note in _notes(job):
        atomic_write_text(note, json.dumps({**description, "written": _written(job)}, indent=1) + "\n")


def _notes(job: PreprocessJob) -> list[Path]:
    return [Path(f"{prefix}.source.json") for prefix in job.output_prefixes()]


def _written(job: PreprocessJob) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in written_pairs(job)}


def _read(note: Path) -> object:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
