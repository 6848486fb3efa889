"""Folders that a run writes to, tried by writing; files that it reads, tried by reading.

Invariant: nothing stays behind, whatever fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from megatron.doctor.finding import Finding, Status, Subject, size

PROBE_BYTES = 16_000_000
SLOW_BYTES_PER_S = 50_000_000
ROOM_BYTES = 1_000_000_000


def check_folders(subject: Subject) -> list[Finding]:
    """Every folder that is written to, and the temporary one."""
    findings = [check_folder(key, folder, _needed(subject, key), subject) for key, folder in subject.folders.items()]
    return [*findings, check_folder("temporary files", Path(tempfile.gettempdir()), 0, subject, is_key=False)]


def check_folder(key: str, folder: Path, needed_bytes: int, subject: Subject, *, is_key: bool = True) -> Finding:
    """Write, flush, lock, rename and read back a file, and look at what is free."""
    name = f"{key} = {folder}" if is_key else f"{key} in {folder}"
    mend = f"mkdir -p {folder}, or another {key}" if is_key else "export TMPDIR=/a/folder/with/room"
    existing = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), Path("/"))
    try:
        rate = _write_test(existing)
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(name, "failure", f"cannot be written: {error.strerror or error}", "a run could not save", mend)
    found = f"{size(free)} free, writes {size(rate)}/s"
    if existing != folder:
        found += " (will be made)"
    one = needed_bytes / max(1, subject.num_checkpoints)
    if free < max(needed_bytes, ROOM_BYTES):
        for_what = f"{subject.num_checkpoints} checkpoints take about {size(needed_bytes)}" if one else "logs need room"
        advice = "keep_last_n_checkpoints: 2, or a larger disk" if one else mend
        status: Status = "failure" if free < max(one, ROOM_BYTES / 20) else "warning"
        return Finding(name, status, found, f"the disk runs full: {for_what}", advice)
    if rate < SLOW_BYTES_PER_S and one:
        cost = f"one checkpoint of {size(one)} takes {one / rate:.0f} s"
        return Finding(name, "warning", found, cost, "save to a faster disk, or less often (checkpoint_factor)")
    return Finding(name, "ok", found)


def check_reads(subject: Subject) -> list[Finding]:
    """Files that the run reads: each can be opened."""
    findings = []
    for key, path in subject.reads.items():
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            cost = "the run stops before its first step"
            mend = f"correct {key}, or make the file with prepare_data.py"
            findings.append(Finding(key, "failure", f"{path}: {error.strerror}", cost, mend))
    if subject.reads and not findings:
        findings.append(Finding("data and tokenizer", "ok", f"{len(subject.reads)} files can be read"))
    return findings


def _needed(subject: Subject, key: str) -> int:
    return subject.checkpoint_bytes if key == "save" else 0


def _write_test(folder: Path) -> float:
    """Bytes per second of writing a file to disk. Raises: OSError if any step of saving a checkpoint does not work."""
    handle, name = tempfile.mkstemp(prefix=".doctor-", dir=folder)
    path = Path(name)
    try:
        block = os.urandom(1 << 20)
        started = time.perf_counter()
        with os.fdopen(handle, "r+b") as file:
            for _ in range(PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            elapsed = time.perf_counter() - started
            with contextlib.suppress(BlockingIOError):
                # Index caches are locked this way; some network disks refuse.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            renamed = path.with_name(path.name + ".moved")
            path.rename(renamed)
            path = renamed
            file.seek(0)
            if file.read(len(block)) != block:
                raise OSError("what was written is not what is read")
        return PROBE_BYTES / max(elapsed, 1e-6)
    finally:
        path.unlink(missing_ok=True)
