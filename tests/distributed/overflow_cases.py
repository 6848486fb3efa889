"""fp16 from a loss scale that overflows at first; runs on every rank of a warm pool."""

from __future__ import annotations

import math
from typing import Any

from megatron.engine.state import optimizer_steps
from tests.distributed.layout_cases import Case, fragments, make_engine, rank_batches


def overflowing(case: Case) -> dict[str, Any]:
    """What every step reports, and what the optimizer has done in the end."""
    engine = make_engine(case)
    before = {(f.name, f.start): f.values for f in fragments(engine) if f.kind == "weight"}
    skipped, scales, kept = [], [], []
    for step in range(case.steps):
        result = engine.train_step(rank_batches(step, case, engine.groups.dp_rank), 1e-3)
        now = {(f.name, f.start): f.values for f in fragments(engine) if f.kind == "weight"}
        kept.append(all((before[key] == now[key]).all() for key in now))
        before = now
        skipped.append(result.is_skipped)
        scales.append(result.loss_scale)
        assert result.is_skipped or math.isfinite(result.grad_norm)
    return {"skipped": skipped, "scales": scales, "kept": kept, "optimizer_steps": optimizer_steps(engine)}
