"""A step that is not finite on one rank is skipped by all: nothing moves, and the culprit is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.anomaly_cases import BAD_STEP, trained_past
from tests.distributed.layout_cases import Case

Ranks = Callable[..., list[Any]]
BASE = Case(steps=4, micro_batch=2, global_batch=8)
GRADIENT = "layers.1.mlp.linear1.weight"

# Which rank is poisoned, and how, at which layout. The last stage of pp=2 holds layers 2 and 3.
LAYOUTS: list[tuple[dict[str, Any], str, str, int]] = [
    ({"dp": 2, "zero_stage": 1}, "gradient", GRADIENT, 1),
    ({"dp": 2, "zero_stage": 2}, "output", "layers.2.attention.dense.weight", 1),
    ({"dp": 2, "zero_stage": 3}, "gradient", GRADIENT, 1),
    ({"tp": 2}, "gradient", "layers.0.attention.query_key_value.weight", 1),
    ({"pp": 2}, "gradient", GRADIENT, 0),
    ({"pp": 2}, "batch", "", 1),
    ({"tp": 2, "pp": 2}, "output", "layers.3.mlp.linear1.weight", 3),
    ({"dp": 2, "pp": 2}, "batch", "", 3),
    ({"dp": 2, "zero_stage": 3}, "batch", "", 0),
    ({"dp": 2, "tp": 2, "zero_stage": 2}, "gradient", GRADIENT, 2),
]
QUICK = {
    0: "fp32 bfloat16",
    1: "bfloat16 fp16",
    2: "fp32 bfloat16 fp16",
    3: "fp16",
    4: "bfloat16",
    5: "fp32",
    6: "fp16",
}


def _cases() -> list[Any]:
    cases = []
    for index, (layout, kind, name, rank) in enumerate(LAYOUTS):
        for precision in ("fp32", "bfloat16", "fp16"):
            marks = [] if precision in QUICK.get(index, "") else [pytest.mark.full]
            where = "-".join(f"{key}{value}" for key, value in layout.items())
            cases.append(
                pytest.param(layout, kind, name, rank, precision, marks=marks, id=f"{where}-{kind}-{precision}")
            )
    return cases


@pytest.mark.parametrize(("layout", "kind", "name", "rank", "precision"), _cases())
def test_all_ranks_skip_the_bad_step(
    ranks: Ranks, layout: dict[str, Any], kind: str, name: str, rank: int, precision: str
) -> None:
    case = Case(**{**vars(BASE), **layout, "precision": precision})
    outcomes = ranks(trained_past, case.world_size, case, kind, name, rank, timeout=120)
    for outcome in outcomes:
        assert outcome["skipped"] == [step == BAD_STEP for step in range(case.steps)]
        assert outcome["kept"]
        assert outcome["kept in rehearsal"]
        assert outcome["optimizer_steps"] == case.steps - 1
        assert outcome["equals spared"]
        assert math.isinf(outcome["norm"])
        # A NaN of the forward pass is not the loss scale's fault.
        assert outcome["scale kept"] == (precision != "fp16" or kind != "gradient")
        assert outcome["origin"] == outcomes[0]["origin"]
    origin = outcomes[0]["origin"]
    if kind == "gradient":
        assert math.isfinite(outcomes[0]["loss"])
        assert f"the gradient of {name} on rank {rank};" in origin
    elif kind == "output":
        assert f"the output of {name.removesuffix('.weight')} on rank" in origin
    dp_rank = rank // case.tp % case.dp
    first, rows = (case.accumulation - 1) * case.dp * case.micro_batch + dp_rank * case.micro_batch, case.micro_batch
    if kind == "batch":
        # The last micro-batch alone is bad, of one replica alone.
        expected = ", ".join(map(str, range(first, first + rows)))
        assert origin.endswith(f"samples of replica {dp_rank}: {expected}")
    assert [f"replica {other}" in origin for other in range(case.dp)] == [other == dp_rank for other in range(case.dp)]


@pytest.mark.parametrize(
    ("layout", "precision"),
    [({"dp": 2, "zero_stage": 1}, "bfloat16"), ({"pp": 2}, "fp16"), ({"dp": 2, "zero_stage": 3}, "fp16")],
)
def test_a_finite_step_that_the_judge_refuses_moves_nothing(
    ranks: Ranks, layout: dict[str, Any], precision: str
) -> None:
    case = Case(**{**vars(BASE), **layout, "precision": precision})
    for outcome in ranks(trained_past, case.world_size, case, "", "", 0, True, timeout=120):
        assert outcome["skipped"] == [step == BAD_STEP for step in range(case.steps)]
        assert outcome["kept"]
        assert outcome["scale kept"]
        assert outcome["equals spared"]
        assert math.isfinite(outcome["loss"])
        assert math.isfinite(outcome["norm"])
        assert "a fault that comes and goes" in outcome["origin"]
