"""Record a trace of a configuration on the ranks of a warm pool, as tools/compare_layouts.py does in processes of its
own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron.config import load
from megatron.engine.distributed import stop_distributed
from megatron.training.setup import build_run
from megatron.training.tracing import record
from tests.distributed.broken import forget_norm_reduction


def record_trace(
    config_file: str, overrides: dict[str, Any], folder: str, steps: int, at: list[int], is_broken: bool = False
) -> None:
    """Train at the layout that the overrides make; is_broken: without the reduction of the norms' gradients."""
    if is_broken:
        forget_norm_reduction()
    run = build_run(load([config_file], overrides, devices=int(os.environ["WORLD_SIZE"])))
    try:
        record(run, Path(folder), steps, at)
    finally:
        run.close()
    stop_distributed()
