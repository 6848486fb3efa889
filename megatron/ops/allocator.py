"""How the C allocator treats memory that was freed.

glibc hands every large freed block back to the kernel, so each training step on a CPU faults the same hundreds of
megabytes in again. Not for GPUs: their tensors come from a cache of torch. Invariant: no value changes, only time.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make this process keep what it frees, for its next allocations; whether the C library can do that.

    Call it before the first large tensor. Measured on a pythia-14m step: 1.1 times the speed, under 1,300 page faults
    instead of 77,000, and 60 to 110 MB more at the peak: glibc reuses aligned blocks only after a few rounds.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
