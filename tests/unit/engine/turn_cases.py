"""Ranks that take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron.engine.distributed import main_rank_first


def take_turns(folder: str, times: int, fails: bool) -> list[bool]:
    """Whether rank 0's turn was over when this rank's came, each time."""
    found, rank, others = [], dist.get_rank(), range(1, dist.get_world_size())
    for number in range(times):
        file = Path(folder, str(number))
        Path(folder, f"{number}-asks-{rank}").touch()
        with contextlib.suppress(ValueError), main_rank_first():
            found.append(file.exists())
            Path(folder, f"{number}-begins-{rank}").touch()
            if rank == 0:
                # Not before all others have asked, and could have begun.
                _until(lambda n=number: all(Path(folder, f"{n}-asks-{other}").exists() for other in others), 10.0)
                _until(lambda n=number: any(Path(folder, f"{n}-begins-{other}").exists() for other in others), 0.2)
                file.touch()
                if fails:
                    raise ValueError("rank 0 fails in its turn")
    return found


def _until(is_so: Callable[[], bool], at_most_s: float) -> None:
    end = time.monotonic() + at_most_s
    while not is_so() and time.monotonic() < end:
        time.sleep(0.005)


def leave_before(folder: str) -> str:
    """Rank 1 does not come to its turn."""
    if dist.get_rank() == 1:
        return "left"
    with main_rank_first():
        return "done"
