"""The division over pipeline stages against DeepSpeed's own functions."""

from __future__ import annotations

import random

import pytest

from megatron.config.plan.architecture import Layer, Parameter
from megatron.config.plan.stages import stage_bounds, stage_layers

utils = pytest.importorskip("deepspeed.runtime.utils", reason="DeepSpeed is not installed")


def random_layers(generator: random.Random) -> list[Layer]:
    kinds = ["WordEmbedding", *["TransformerBlock"] * generator.randint(1, 13), "Norm", "Head"]
    sizes = [generator.choice([1, 2, 3, 50, 51]) for _ in kinds]
    return [
        Layer(str(i), kind, (Parameter("w", (size,), False),))
        for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_bounds_are_deepspeeds(seed: int) -> None:
    generator = random.Random(seed)
    layers = random_layers(generator)
    for stages in (2, 3, 4, 7, len(layers) - 1, len(layers), len(layers) + 2):
        sizes = [layer.numel_on_rank(1) for layer in layers]
        blocks = [int(layer.kind == "TransformerBlock") for layer in layers]
        assert stage_bounds(layers, stages, "uniform", 1) == utils.partition_uniform(len(layers), stages)
        assert stage_bounds(layers, stages, "parameters", 1) == utils.partition_balanced(sizes, stages)
        assert stage_bounds(layers, stages, "type:transformer|mlp", 1) == utils.partition_balanced(blocks, stages)


def test_a_tied_head_brings_its_table_to_another_stage_only() -> None:
    table = Parameter("embedding.word_embeddings.weight", (10, 4), True)
    layers = [Layer("e", "WordEmbedding", (table,)), Layer("b", "TransformerBlock", ()), Layer("h", "", (), ties=True)]
    assert [x.parameters for x in stage_layers(layers, 1, "uniform", 1)[0]] == [(table,), (), ()]
    assert stage_layers(layers, 2, "uniform", 1)[1][-1].parameters == (table,)
