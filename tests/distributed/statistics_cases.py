"""Steps with every statistic on; runs on every rank of a warm pool."""

from __future__ import annotations

from typing import Any

from megatron.engine.statistics import Statistics, StatisticsOptions
from tests.distributed.layout_cases import Case, fragments, learning_rate, make_engine, rank_batches

EVERYTHING = StatisticsOptions(
    param_norm=True, grad_norm=True, grad_zeros=True, optimizer_states=True, noise_scale_batches=2
)


def watched(case: Case, offload: bool = False) -> dict[str, Any]:
    """What every step's statistics say, and this rank's fragments in the end."""
    engine = make_engine(case)
    options = StatisticsOptions(**{**vars(EVERYTHING), "offload_noise_scale": offload})
    statistics = Statistics(engine, options, case.global_batch)
    steps, norms, skipped = [], [], []
    for step in range(case.steps):
        with statistics.watching():
            result = engine.train_step(rank_batches(step, case, engine.groups.dp_rank), learning_rate(step))
        steps.append(statistics.collect(result))
        norms.append(result.grad_norm)
        skipped.append(result.is_skipped)
    return {"steps": steps, "norms": norms, "skipped": skipped, "fragments": fragments(engine)}
