"""How much memory this process needed at most.

Invariant: asking neither synchronises a device nor creates a context on one.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class PeakMemory:
    """Peaks since the start of the process, in bytes; the device's are None where torch has used no CUDA device."""

    resident_bytes: int
    device_allocated_bytes: int | None = None
    device_reserved_bytes: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.resident_bytes / 2**30:.2f} GiB of host memory"]
        if self.device_allocated_bytes is not None and self.device_reserved_bytes is not None:
            parts.append(
                f"{self.device_allocated_bytes / 2**30:.2f} GiB allocated "
                f"({self.device_reserved_bytes / 2**30:.2f} reserved) on the device"
            )
        return ", ".join(parts)


def peak_memory() -> PeakMemory:
    """The peaks of this process, on the host and on its current CUDA device."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return PeakMemory(_peak_resident_bytes())
    return PeakMemory(_peak_resident_bytes(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def _peak_resident_bytes() -> int:
    # getrusage counts what this process was before it became this program; on Linux, /proc has the program's own peak.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
