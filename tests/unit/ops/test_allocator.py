"""Freed memory is kept: after a few rounds an allocation of the same size faults nothing in."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, because the setting cannot be taken back.
PROGRAM = """
import resource, sys
from megatron.ops.allocator import keep_freed_memory
if "keep" in sys.argv and not keep_freed_memory():
    print(-1); raise SystemExit
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4):
    faults()
print(faults())
"""


def _faults(*arguments: str) -> int:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def test_repeated_allocations_fault_nothing_in() -> None:
    kept = _faults("keep")
    if kept < 0:
        pytest.skip("the C library has no mallopt")
    assert kept < 100
    assert _faults() > 1000, "without the setting the comparison must show faults, else this test shows nothing"
