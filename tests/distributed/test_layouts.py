"""What holds bitwise within one layout, and what is refused. That layouts equal one process: test_matrix.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from megatron.model.build import layer_list
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from tests.distributed.differences import run_and_compare
from tests.distributed.layout_cases import Case, tiny_spec, train_case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"tp": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_is_bitwise_the_same(ranks: Ranks, layout: dict[str, Any], dropout: float) -> None:
    """Also with dropout: the second forward pass draws the same masks, on divided and on replicated tensors."""
    spec = {"hidden_dropout": dropout, "attention_dropout": dropout}
    kept, again = (
        ranks(train_case, Case(**layout).world_size, Case(**layout, spec=spec, steps=3, recompute=recompute))
        for recompute in (False, True)
    )
    assert [result["losses"] for result in kept] == [result["losses"] for result in again]
    assert all(result["losses"] == kept[0]["losses"] for result in kept)


@pytest.mark.parametrize("layout", [{"dp": 2, "zero_stage": 3}, {"tp": 2, "pp": 2}, {"pp": 3}], ids=str)
def test_validation_between_steps_changes_nothing(ranks: Ranks, layout: dict[str, Any]) -> None:
    """DeepSpeed's pipeline has failed at train, evaluate, train before (DeepSpeed issues 4661, 3911)."""
    case = Case(**layout, steps=3, global_batch=4, micro_batch=1, spec={"tied_head": True, "residual": "sequential"})
    without, with_it = (
        ranks(train_case, case.world_size, dataclasses.replace(case, evaluates=evaluates))
        for evaluates in (False, True)
    )
    for one, other in zip(without, with_it, strict=True):
        assert one["losses"] == other["losses"]
        assert one["valid"] == other["valid"]
        for mine, theirs in zip(one["fragments"], other["fragments"], strict=True):
            assert (mine.values == theirs.values).all(), mine.name


def test_token_mean_does_not_depend_on_accumulation(ranks: Ranks) -> None:
    """loss_normalization: tokens, uneven masks: one micro-batch of 8 sequences is as good as four of 2."""
    many = Case(normalization="tokens", is_masked=True, steps=3, eps=1e-3)
    # The oracle of four micro-batches, whose first has no unmasked token: its mask is part of the batch.
    reference = oracle_run(many)
    one = dataclasses.replace(many, micro_batch=8, masked_rows=many.micro_batch)
    assert excesses(run_and_compare(ranks, one, reference), FP32) == []


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, 2, "3 kv heads do not divide over 2 ranks"),
        ({"num_heads": 6, "num_kv_heads": 2}, 4, "6 heads and 40 MLP features do not divide over 4 ranks"),
        ({"ffn_size": 41}, 2, "4 heads and 41 MLP features do not divide over 2 ranks"),
    ],
)
def test_what_does_not_divide_is_refused_with_reason(changes: dict[str, Any], tp: int, message: str) -> None:
    groups = ProcessGroups(Topology(tp_size=tp), 0)
    with pytest.raises(ValueError, match=message):
        layer_list(tiny_spec(**changes), groups)
