"""Ranks that take turns."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist

from megatron.engine.distributed import main_rank_first


def take_turns(folder: str, times: int, fails: bool) -> list[bool]:
    """Whether rank 0's file was there when this rank's turn came, each time."""
    found = []
    for number in range(times):
        file = Path(folder, str(number))
        with contextlib.suppress(ValueError), main_rank_first():
            found.append(file.exists())
            if dist.get_rank() == 0:
                file.touch()
                if fails:
                    raise ValueError("rank 0 fails in its turn")
    return found


def leave_before(folder: str) -> str:
    """Rank 1 does not come to its turn."""
    if dist.get_rank() == 1:
        return "left"
    with main_rank_first():
        return "done"
