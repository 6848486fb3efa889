"""Soft prompts at every kind of layout equal one process; the model's own weights do not move by a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.model.build import build_model
from megatron.model.spec import LowRank, SoftPrompt, WidthScaling
from tests.distributed.cells import BLOCKS, EPS
from tests.distributed.differences import differences
from tests.distributed.layout_cases import Case, assemble, tiny_spec, train_case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

Ranks = Callable[..., list[Any]]

FIVE = {"steps": 5, "eps": EPS}
# 5 + 11 = 16 positions divide over two and four ranks; neither of the two does.
ODD = {**FIVE, "seq_length": 11}
RANDOM, WORDS = SoftPrompt(5, 0.3), SoftPrompt(5, init_ids=(7, 90, 7, 0, 33))
SEQUENCE = {"task": "sequence_classification", "num_labels": 3}
# As in test_label_heads: no biases.
QUESTION = {"task": "question_answering", "num_labels": 2, "norm": "rmsnorm"}
MUP = WidthScaling(8, 10, num_heads=2, num_kv_heads=2, head_dim=4, embedding_mult=1.5)
LORA = LowRank(2, 4.0, ("dense", "query_key_value"))

CASES = {
    "one": Case(**FIVE, spec={"soft_prompt": SoftPrompt(4)}),
    "dp2-zero1": Case(dp=2, **ODD, is_masked=True, spec={"soft_prompt": WORDS}),
    "dp2-zero2": Case(dp=2, zero_stage=2, micro_batch=1, **ODD, spec={"soft_prompt": RANDOM, "position": "alibi"}),
    "dp2-zero3": Case(dp=2, zero_stage=3, **ODD, spec={"soft_prompt": WORDS, "tied_head": True}),
    "dp2-tokens": Case(dp=2, **ODD, is_masked=True, normalization="tokens", spec={"soft_prompt": RANDOM, "window": 3}),
    "tp2": Case(tp=2, **ODD, spec={"soft_prompt": WORDS, **BLOCKS["llama"]}),
    "tp2-sp": Case(tp=2, sequence_parallel=True, **ODD, spec={"soft_prompt": WORDS, **BLOCKS["sequential"]}),
    "tp4-sp-learned": Case(tp=4, sequence_parallel=True, **ODD, spec={"soft_prompt": RANDOM, **BLOCKS["learned"]}),
    "tp2-sp-pp2-recompute": Case(
        tp=2, pp=2, sequence_parallel=True, recompute=True, **ODD, spec={"soft_prompt": WORDS, "tied_head": True}
    ),
    "pp2": Case(pp=2, **ODD, recompute=True, spec={"soft_prompt": RANDOM}),
    # The first stage is the embedding alone: the prompt begins on the second one.
    "pp2-parameters": Case(
        pp=2,
        **ODD,
        partition_method="parameters",
        spec={"soft_prompt": WORDS, "vocab_size": 4000, "padded_vocab_size": 4096, "num_layers": 2},
    ),
    "dp2-pp2": Case(pp=2, dp=2, **ODD, spec={"soft_prompt": RANDOM, **BLOCKS["learned"]}),
    "tp2-dp2-lora": Case(tp=2, dp=2, **ODD, spec={"soft_prompt": WORDS, "lora": LORA}),
    "pp2-sequence": Case(pp=2, **ODD, spec={"soft_prompt": RANDOM, **SEQUENCE}),
    "dp2-answers": Case(dp=2, **ODD, spec={"soft_prompt": RANDOM, **QUESTION}),
    "tp2-pp2-mup": Case(tp=2, pp=2, **ODD, spec={"soft_prompt": RANDOM, "mup": MUP, "tied_head": True}),
    "tp2-labels": Case(
        tp=2, **ODD, is_masked=True, spec={"soft_prompt": WORDS, "task": "token_classification", "num_labels": 3}
    ),
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
    assert "soft_prompt.weight" in moved
    if not case.spec.keys() & {"lora", "task"}:
        assert set(assemble(results, "exp_avg")) == {"soft_prompt.weight"}


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("bfloat16", {"tp": 2, "dp": 2}),
        ("bfloat16", {"pp": 2}),
        ("bfloat16", {"tp": 2, "zero_stage": 3}),
        ("fp16", {"dp": 2, "zero_stage": 2}),
        pytest.param("fp16", {"tp": 2, "pp": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_half_precision_keeps_frozen_weights_to_the_bit(ranks: Ranks, precision: str, layout: dict[str, int]) -> None:
    case = Case(**layout, precision=precision, steps=2, seq_length=11, spec={"soft_prompt": WORDS})
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    after = assemble(ranks(train_case, case.world_size, case))
    initial = dict(build_model(tiny_spec(**case.spec), seed=case.seed).named_parameters())
    for name, tensor in after.items():
        if not case.is_trained(name):
            torch.testing.assert_close(tensor, initial[name].detach().to(dtype).float(), rtol=0, atol=0)
        else:
            assert not torch.equal(tensor, initial[name].detach()), name
