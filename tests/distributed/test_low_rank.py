"""Low-rank updates and frozen parameters at every kind of layout equal one process; frozen weights do not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.model.build import build_model
from megatron.model.spec import LowRank
from tests.distributed.cells import BLOCKS, EPS
from tests.distributed.differences import differences
from tests.distributed.layout_cases import Case, assemble, tiny_spec, train_case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

Ranks = Callable[..., list[Any]]

ALL = LowRank(3, 6.0, ("dense", "key_value", "linear1", "linear2", "query", "query_key_value", "gate", "up"))
HEADS = LowRank(2, 2.0, ("query_key_value",))
FIVE = {"steps": 5, "eps": EPS}

CASES = {
    "one": Case(**FIVE, spec={"lora": ALL}),
    "dp2-zero2": Case(dp=2, zero_stage=2, **FIVE, spec={"lora": ALL}),
    "dp2-zero3": Case(dp=2, zero_stage=3, **FIVE, spec={"lora": ALL, "tied_head": True}),
    "tp2-sp": Case(tp=2, sequence_parallel=True, **FIVE, spec={"lora": ALL, **BLOCKS["sequential"]}),
    "tp4-shared-kv": Case(tp=4, **FIVE, spec={"lora": ALL, "num_kv_heads": 2, **BLOCKS["llama"]}),
    "tp2-pp2-recompute": Case(tp=2, pp=2, recompute=True, **FIVE, spec={"lora": HEADS}),
    "pp2-tied": Case(pp=2, **FIVE, spec={"lora": ALL, "tied_head": True}),
    # A stage in which nothing learns, and a first one whose inputs need no gradient.
    "pp4-frozen-ends": Case(pp=4, **FIVE, frozen=("embedding.*", "layers.0.*", "layers.3.*", "final_norm.*", "head.*")),
    "dp2-zero3-frozen": Case(dp=2, zero_stage=3, **FIVE, frozen=("embedding.*", "layers.1.mlp.*", "*.bias")),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    results = ranks(train_case, case.world_size, case)
    assert excesses(differences(results, oracle_run(case)), FP32) == []
    initial = dict(build_model(tiny_spec(**case.spec), seed=case.seed).named_parameters())
    after = assemble(results)
    moved = {key for key, tensor in after.items() if not torch.equal(tensor, initial[key].detach())}
    assert moved == {key for key in after if case.is_trained(key)}


def test_half_precision_keeps_frozen_weights_to_the_bit(ranks: Ranks) -> None:
    case = Case(tp=2, dp=2, precision="bfloat16", steps=2, spec={"lora": ALL})
    after = assemble(ranks(train_case, 4, case))
    initial = dict(build_model(tiny_spec(**case.spec), seed=case.seed).named_parameters())
    for name, tensor in after.items():
        if not case.is_trained(name):
            torch.testing.assert_close(tensor, initial[name].detach().bfloat16().float(), rtol=0, atol=0)
        else:
            assert not torch.equal(tensor, initial[name].detach()), name
