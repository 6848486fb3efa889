"""muP at every kind of layout equals one process: the function, and a learning rate of its own for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.model.build import build_model
from megatron.model.spec import LowRank, SoftPrompt, WidthScaling
from tests.distributed import resume_matrix
from tests.distributed.cells import BLOCKS, EPS
from tests.distributed.differences import differences
from tests.distributed.layout_cases import Case, assemble, learning_rate, tiny_spec, train_case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

Ranks = Callable[..., list[Any]]

# Every width by another ratio, so that a factor in the wrong place shows.
MUP = WidthScaling(
    8, 10, num_heads=2, num_kv_heads=2, head_dim=4,
    embedding_mult=1.5, position_mult=0.5, attention_temp=0.8, output_temp=1.2,
)  # fmt: skip
UPDATES = LowRank(2, 4.0, ("dense", "linear1", "linear2", "query_key_value"))
FIVE = {"steps": 5, "eps": EPS}

CASES = {
    "dp2-zero2": Case(dp=2, zero_stage=2, **FIVE, spec={"mup": MUP, "position": "learned"}),
    "dp2-zero3": Case(dp=2, zero_stage=3, **FIVE, spec={"mup": MUP, "tied_head": True}),
    "tp2-sp": Case(tp=2, sequence_parallel=True, **FIVE, spec={"mup": MUP, **BLOCKS["sequential"]}),
    "tp4-shared-kv": Case(tp=4, **FIVE, spec={"mup": MUP, "num_kv_heads": 2, **BLOCKS["llama"]}),
    "tp2-pp2-tied": Case(tp=2, pp=2, **FIVE, spec={"mup": MUP, "tied_head": True}),
    "tp2-pp2-lora": Case(tp=2, pp=2, **FIVE, spec={"mup": MUP, "lora": UPDATES}),
    "pp2-prompt": Case(
        pp=2, dp=1, **FIVE, spec={"mup": MUP, "init_scale": 1.5, "soft_prompt": SoftPrompt(3, init_ids=(7, 90, 0))}
    ),
    # A stage without a block: its optimizer has the groups of the others all the same.
    "pp4-head-alone": Case(pp=4, dp=1, partition_method="parameters", **FIVE, spec={"mup": MUP, "num_layers": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    results = ranks(train_case, case.world_size, case)
    expected = oracle_run(case)
    assert excesses(differences(results, expected), FP32) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(dp=2, zero_stage=1, precision="bfloat16", steps=1, spec={"mup": MUP}),
        Case(tp=2, pp=2, precision="bfloat16", steps=1, spec={"mup": MUP}),
        Case(dp=2, zero_stage=3, precision="fp16", steps=1, spec={"mup": MUP}),
        Case(precision="fp16", steps=1, spec={"mup": MUP}),
    ],
    ids=lambda case: f"{case.precision}-tp{case.tp}-pp{case.pp}-zero{case.zero_stage}",
)
def test_half_precision_steps_have_the_rate_of_each_parameter(ranks: Ranks, case: Case) -> None:
    """Adam's first step moves an element by its learning rate, whatever its gradient."""
    after = assemble(ranks(train_case, case.world_size, case))
    dtype = getattr(torch, "float16" if case.precision == "fp16" else case.precision)
    initial = dict(build_model(tiny_spec(**case.spec), seed=case.seed).named_parameters())
    assert len({case.lr_factor(name) for name in initial}) == 3
    for name, parameter in initial.items():
        start = parameter.detach()
        moved = min(
            # Masters begin at the weights as drawn, or as rounded.
            abs(float((after[name] - begin).abs().median()) / (learning_rate(0) * case.lr_factor(name)) - 1)
            for begin in (start, start.to(dtype).float())
        )
        assert moved < 0.1, name


def test_layouts_continue_each_other(ranks: Ranks, tmp_path: Path) -> None:
    """Groups of other rates hold other parameters at each layout; checkpoints know parameters alone."""
    layouts = [resume_matrix.case(*sizes) for sizes in ((2, 1, 2, 2), (1, 2, 1, 1), (1, 1, 2, 3))]
    ring = [replace(layout, spec={**layout.spec, "mup": MUP}) for layout in layouts]
    outcomes = list(resume_matrix.run_ring(ranks, ring, tmp_path))
    assert len(outcomes) == 3
    assert [resume_matrix.row(outcome) for outcome in outcomes if not outcome.is_good] == []


def test_the_factors_differ() -> None:
    """That the layouts above have something to get wrong."""
    case = CASES["tp4-shared-kv"]
    names = ("embedding.word_embeddings.weight", "layers.0.attention.query.weight", "layers.0.mlp.linear2.weight")
    spec = tiny_spec(**case.spec)
    dense = case.lr_factor("layers.0.attention.dense.weight")
    assert [case.lr_factor(name) for name in names] == [1.0, 8 / 24, 10 / spec.ffn_size]
    assert dense == 8 / (spec.num_heads * spec.head_dim)
