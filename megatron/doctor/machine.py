"""Memory, cores, limits, shared memory and the environment of this host.

Invariant: limits are those of this process, which a run started from here inherits.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path

from megatron.common.devices import count_cores
from megatron.common.rank import starter_of
from megatron.doctor.finding import Finding, Status, Subject, size

OPEN_FILES = 4096
SHARED_MEMORY_BYTES = 512_000_000
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_cores(subject: Subject, cores: int | None = None) -> Finding:
    """Cores for the processes of this host."""
    cores = count_cores() if cores is None else cores
    ranks = subject.num_processes
    found = f"{cores} for {ranks} process{'es' if ranks != 1 else ''}"
    if ranks > cores and subject.device != "cuda":
        cost = "processes take turns: each step is slower than with fewer of them"
        return Finding("CPU cores", "warning", found, cost, f"cpu_processes: {cores}")
    return Finding("CPU cores", "ok", found)


def check_memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Finding:
    """Memory that is free, within the container's limit."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return Finding("memory", "note", "unknown", "how much memory is free could not be read")
    try:
        used = int(limit.with_name("memory.current").read_text(encoding="utf-8"))
        available = min(available, int(limit.read_text(encoding="utf-8")) - used)
    except (OSError, ValueError):
        pass
    if available < 2_000_000_000:
        cost = "one process needs about 1 GB before the model"
        return Finding(
            "memory", "warning", f"{size(available)} free", cost, "end other programs, or raise the container's limit"
        )
    return Finding("memory", "ok", f"{size(available)} free")


def check_limits(
    open_files: tuple[int, int] | None = None, processes: tuple[int, int] | None = None, num_processes: int = 1
) -> list[Finding]:
    """ulimits: (soft, hard) of open files and of processes."""
    soft, hard = open_files or resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < OPEN_FILES:
        raise_to = 65536 if hard == unlimited else min(hard, 65536)
        cost = "data sets of many files and many loader processes run out of file handles"
        mend = f"ulimit -n {raise_to}" if raise_to > soft else "raise nofile in /etc/security/limits.conf"
        findings = [Finding("open files", "warning", f"at most {soft}", cost, mend)]
    else:
        findings = [Finding("open files", "ok", "unlimited" if soft == unlimited else f"at most {soft}")]
    soft, _ = processes or resource.getrlimit(resource.RLIMIT_NPROC)
    # About 20 threads a rank, its loader's processes, and room for what else the user runs.
    needed = 200 + 60 * num_processes
    if soft != unlimited and soft < needed:
        cost = f"{num_processes} ranks with their threads need about {needed}; starting one fails with EAGAIN"
        findings.append(Finding("processes", "failure", f"at most {soft}", cost, f"ulimit -u {needed * 4}"))
    return findings


def check_shared_memory(subject: Subject, folder: Path = Path("/dev/shm")) -> list[Finding]:
    """/dev/shm, through which GPUs of one host exchange data, and what killed runs left in it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        cost = "NCCL passes data between GPUs of one host through it"
        status: Status = "note" if subject.device == "cpu" else "warning"
        return [Finding("shared memory", status, f"{folder}: {error.strerror}", cost, "export NCCL_SHM_DISABLE=1")]
    findings = []
    found = f"{size(usage.free)} of {size(usage.total)} free"
    if usage.free < SHARED_MEMORY_BYTES and subject.device != "cpu":
        cost = "NCCL passes data between GPUs of one host through it, and fails where it is full"
        mend = "start the container with --shm-size=8g, or export NCCL_SHM_DISABLE=1 (slower)"
        findings.append(Finding("shared memory", "warning", found, cost, mend))
    else:
        findings.append(Finding("shared memory", "ok", found))
    left = [path for path in _own_files(folder) if path.name.startswith(("deepspeed_allreduce_buffer_", "torch_"))]
    stale = [path for path in left if time.time() - path.stat().st_mtime > 3600]
    if stale:
        total = sum(path.stat().st_size for path in stale)
        cost = "memory that runs which were killed hold on to"
        found = f"{len(stale)} files, {size(total)}, older than an hour"
        mend = f"rm {folder}/deepspeed_allreduce_buffer_* {folder}/torch_*   (when no run is on this host)"
        findings.append(Finding("shared memory left behind", "warning", found, cost, mend))
    return findings


def check_environment(subject: Subject) -> list[Finding]:
    """Variables that would mislead a run."""
    environment, findings = subject.environment, []
    # An interactive shell has no rank; left-over variables make every script believe that it is one.
    if starter_of(environment) == "torchrun" and "TORCHELASTIC_RUN_ID" not in environment:
        there = [name for name in _RANK_VARIABLES if name in environment]
        cost = "deepy.py takes itself for one rank of a run that others have started, and waits for them"
        findings.append(Finding("environment", "failure", f"{', '.join(there)} set", cost, f"unset {' '.join(there)}"))
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and threads.isdigit() and int(threads) * subject.num_processes > 2 * count_cores():
        cost = f"{subject.num_processes} processes with {threads} threads each crowd {count_cores()} cores"
        findings.append(Finding("OMP_NUM_THREADS", "warning", threads, cost, "unset OMP_NUM_THREADS"))
    if environment.get("CUDA_LAUNCH_BLOCKING") == "1":
        cost = "every kernel waits for the one before: for debugging only"
        findings.append(Finding("CUDA_LAUNCH_BLOCKING", "warning", "1", cost, "unset CUDA_LAUNCH_BLOCKING"))
    return findings or [Finding("environment", "ok", "no variable that misleads a run")]


def _own_files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file() and path.stat().st_uid == os.getuid()]
    except OSError:
        return []
