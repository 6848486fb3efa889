"""Heads of labels at every kind of layout equal one process in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron.model.spec import LowRank
from tests.distributed.cells import EPS
from tests.distributed.differences import differences
from tests.distributed.layout_cases import Case, train_case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

Ranks = Callable[..., list[Any]]

FIVE = {"steps": 5, "eps": EPS}
SEQUENCE = {"task": "sequence_classification", "num_labels": 3}
TOKENS = {"task": "token_classification", "num_labels": 5, "head_bias": True}
# No biases: the same number for all tokens changes no softmax over them, so their gradient would be rounding alone.
QUESTION = {"task": "question_answering", "num_labels": 2, "norm": "rmsnorm"}

CASES = {
    "tokens": Case(**FIVE, is_masked=True, spec=TOKENS),
    "tokens-tp2-sp": Case(tp=2, sequence_parallel=True, **FIVE, is_masked=True, normalization="tokens", spec=TOKENS),
    "sequence-pp2": Case(pp=2, **FIVE, spec=SEQUENCE),
    "sequence-tp2-lora": Case(tp=2, **FIVE, spec={**SEQUENCE, "lora": LowRank(2, 4.0, ("query_key_value",))}),
    "question": Case(**FIVE, spec=QUESTION),
    "question-tp2-pp2": Case(tp=2, pp=2, **FIVE, is_masked=True, masked_rows=2, spec=QUESTION),
    "question-dp2-zero3": Case(dp=2, zero_stage=3, **FIVE, normalization="tokens", spec=QUESTION),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    found = differences(ranks(train_case, case.world_size, case), oracle_run(case))
    assert excesses(found, FP32) == []
