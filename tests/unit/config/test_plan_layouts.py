"""The search for layouts: what it finds is allowed, fits, loads again and is always the same."""

from __future__ import annotations

import pytest
import yaml

from megatron.config import Config, load
from megatron.config.plan import Cluster, estimate_memory, search_config, search_text, search_values
from megatron.config.plan.job import job_of, layout_of
from megatron.config.plan.layouts import Search, batch_of, different, layouts, yaml_lines
from tests.unit.config.conftest import TINY

SMALL = {
    **TINY,
    "hidden_size": 96,
    "num_attention_heads": 12,
    "num_kv_heads": 4,
    "train_batch_size": 48,
    "no_weight_tying": True,
    "pos_emb": "rotary",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "precision": "bfloat16",
    "device": "cuda",
}
LAYOUT_KEYS = {
    "pipe_parallel_size",
    "model_parallel_size",
    "sequence_parallel",
    "zero_optimization",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "checkpoint_activations",
    "recompute_activations",
    "checkpoint_num_layers",
}


def small(**changes: object) -> Config:
    return load([], {**SMALL, **changes}, devices=1, planning=True)


@pytest.mark.parametrize(("gpus", "per_node"), [(1, 8), (2, 8), (12, 4), (16, 8)])
def test_every_layout_loads_by_the_rules(gpus: int, per_node: int) -> None:
    """Those that differ in more than the micro-batch: the loader knows every rule, the search must know the same."""
    config = small()
    seen = set()
    for layout in layouts(job_of(config), batch_of(config), gpus, per_node):
        kind = (layout.stages, layout.tp, layout.zero, layout.recompute, layout.group, layout.sequence_parallel)
        assert layout.world_size == gpus
        assert layout.global_batch == 48
        assert layout.tp <= per_node
        if kind in seen:
            continue
        seen.add(kind)
        loaded = load([], {**SMALL, **yaml.safe_load("\n".join(yaml_lines(layout)))}, devices=gpus)
        assert layout_of(loaded) == layout
    assert any(kind[2] == 3 for kind in seen) == (gpus > 1)


def test_tensor_ranks_divide_heads_and_stay_within_a_node() -> None:
    config = small()
    found = {layout.tp for layout in layouts(job_of(config), batch_of(config), 24, 8)}
    # 12 query heads, 4 kv heads, 384 feed-forward features, 8 GPUs a node: not 3, which 4 kv heads do not allow.
    assert found == {1, 2, 4}
    assert {layout.tp for layout in layouts(job_of(config), batch_of(config), 24, 2)} == {1, 2}


def found_for(name: str, gpus: int, memory: float) -> tuple[Config, Search]:
    config = load([f"configs/{name}.yml"], {"device": "cuda"}, devices=gpus, planning=True)
    return config, search_config(config, gpus, memory, Cluster())


def test_20b_on_64_gpus() -> None:
    config, found = found_for("20B", 64, 80e9)
    assert found.fitting
    assert all(one.memory.total <= 80e9 and one.layout.world_size == 64 for one in found.fitting)
    assert all(one.layout.global_batch == config.batch.train_batch_size for one in found.fitting)
    assert [one.time.total for one in found.fitting] == sorted(one.time.total for one in found.fitting)
    assert found.fitting[0].speed == 1.0
    best = different(found.fitting, 4)
    assert len({(one.layout.stages, one.layout.tp, one.layout.zero) for one in best}) == 4
    # What is printed, put into the file, is what was promised.
    for one in best:
        lines = yaml.safe_load("\n".join(yaml_lines(one.layout)))
        assert set(lines) <= LAYOUT_KEYS
        again = load(["configs/20B.yml"], {**lines, "device": "cuda"}, devices=64)
        assert layout_of(again) == one.layout
        # The block in the file has bucket sizes of its own, which the search kept.
        assert estimate_memory(again).total == pytest.approx(one.memory.total, rel=0.02)
    assert found == found_for("20B", 64, 80e9)[1]


def test_less_memory_means_more_division_or_recomputation() -> None:
    _, roomy = found_for("20B", 64, 80e9)
    _, narrow = found_for("20B", 64, 24e9)
    assert 0 < len(narrow.fitting) < len(roomy.fitting)
    assert narrow.fitting[0].time.total > roomy.fitting[0].time.total


def test_what_does_not_fit_says_by_how_much_and_of_what() -> None:
    _, found = found_for("175B", 8, 80e9)
    assert not found.fitting
    assert found.closest is not None
    text = search_text(found, 8, 80e9, Cluster())
    assert "none of" in text
    assert "optimizer states" in text
    assert search_values(found)["closest"]["memory_bytes"]["total"] > 80e9


def test_one_gpu_has_one_way_to_divide() -> None:
    config = small()
    found = search_config(config, 1, 80e9, Cluster())
    assert {(one.layout.stages, one.layout.tp, one.layout.dp, one.layout.zero) for one in found.fitting} == {
        (1, 1, 1, 1)
    }
