"""The plan's memory against measured bytes: real steps of the engine at several layouts, precisions, architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import load
from megatron.config.plan import estimate_stage
from megatron.config.plan.memory import stage_moments
from tests.distributed.memory_cases import Measured, measure

Ranks = Callable[..., list[Any]]

# Wide enough that what no formula counts (positions, masks, a scalar here and there) is small beside it.
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "seq_length": 64,
    "padded_vocab_size": 512,
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "not/needed.json",
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "pipe_partition_method": "type:transformer",
    "device": "cpu",
}
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "gpt_j_residual": False,
    "num_kv_heads": 2,
    "use_bias_in_mlp": False,
}
ZERO_2, ZERO_3 = {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 3}}
HALF, BRAIN = {"precision": "fp16"}, {"precision": "bfloat16"}
STAGED = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 3}
TWO, WITH_SEQUENCE = {"model_parallel_size": 2}, {"model_parallel_size": 2, "sequence_parallel": True}
FULL, SELECTIVE = {"recompute_activations": "full"}, {"recompute_activations": "selective"}
ONCE = {"gradient_accumulation_steps": 1}
LABELLED = {"train_label_data_paths": ["l"], "pack_impl": "unpacked"} | {
    f"{part}_data_paths": ["d"] for part in ("train", "valid", "test")
}

# (ranks, keys). The first list runs always, the second with the larger matrix.
QUICK: list[tuple[int, dict[str, Any]]] = [
    (1, ONCE),
    (1, LLAMA),
    (2, HALF | ZERO_2),
    (2, BRAIN),
    (2, ZERO_3),
    (2, STAGED | BRAIN),
    (2, WITH_SEQUENCE),
    (1, FULL | ONCE),
    (1, {"lora_rank": 4, "lora_targets": ["attention"], "gradient_accumulation_steps": 1}),
    (1, LABELLED | {"task": "token_classification", "num_labels": 5} | ONCE),
    (1, SELECTIVE | {"gpt_j_residual": False, "hidden_dropout": 0.1}),
]
MORE: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, ZERO_2),
    (1, HALF),
    (2, HALF | ZERO_3),
    (1, BRAIN),
    (2, BRAIN | ZERO_2),
    (2, BRAIN | ZERO_3),
    (2, STAGED),
    (4, {"pipe_parallel_size": 4, "gradient_accumulation_steps": 6}),
    (4, {"pipe_parallel_size": 4, "gradient_accumulation_steps": 6} | FULL),
    (2, TWO),
    (2, TWO | {"num_kv_heads": 1}),
    (1, FULL),
    (1, FULL | {"checkpoint_num_layers": 2}),
    (1, BRAIN | {"norm": "rmsnorm"}),
    (1, {"norm": "scalenorm"}),
    (1, {"soft_prompt_tuning": {"num_tokens": 32}, "max_position_embeddings": 96}),
    (2, {"soft_prompt_tuning": {"num_tokens": 32}, "max_position_embeddings": 96, "hidden_dropout": 0.1} | STAGED),
    (1, {"lora_rank": 4}),
    (1, {"lora_rank": 4, "lora_dropout": 0.1}),
    *((1, {"lora_rank": 4, "lora_targets": targets} | ONCE) for targets in (["query_key_value"], ["mlp"], ["dense"])),
    (1, {"lora_rank": 4, "lora_targets": ["attention"], "lora_dropout": 0.1} | LLAMA | ONCE),
    (1, {"lora_rank": 4, "lora_targets": ["query"], "activation": "relu", "num_kv_heads": 2} | ONCE),
    (2, {"lora_rank": 4, "lora_targets": ["attention"]} | TWO | ONCE),
    (1, {"lora_rank": 4, "lora_targets": ["attention"]} | BRAIN | FULL | ONCE),
    (1, {"train_parameters": ["layers.*.mlp.linear2.*"]} | ONCE),
    (1, {"train_parameters": ["*layernorm*"], "no_weight_tying": True} | ONCE),
    (1, {"train_parameters": ["layers.[23].attention.*"], "gpt_j_residual": False} | ONCE),
    (2, {"lora_rank": 4, "lora_targets": ["attention"]} | STAGED),
    (1, LABELLED | {"task": "question_answering"} | ONCE),
    (2, LABELLED | {"task": "sequence_classification", "num_labels": 3, "lora_rank": 4} | TWO),
    (1, {"pos_emb": "none", "sliding_window_width": 16, "sliding_window_layers": [1], "num_kv_heads": 1} | ONCE),
    (2, ZERO_2 | {"freeze_parameters": ["embedding.*", "head.*", "layers.[01].*"]}),
    (1, {"norm": "non_parametric_layernorm", "pos_emb": "learned", "no_weight_tying": False}),
    (1, {"use_qk_layernorm": True}),
    (1, {"use_qk_layernorm": True, "norm": "rmsnorm", "num_kv_heads": 2}),
    (1, {"pos_emb": "alibi"}),
    (1, {"pos_emb": "rpe"}),
    (1, {"pos_emb": "none", "sliding_window_width": 16, "num_kv_heads": 1}),
    (1, {"attention_dropout": 0.1}),
    (1, {"activation": "relu"}),
    (1, {"activation": "softsign"}),
    (1, {"activation": "reglu"}),
    (1, {"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}} | FULL | ONCE),
    (1, {"optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}} | FULL | ONCE),
]


def name_of(case: object) -> str:
    if not isinstance(case, dict):
        return str(case)
    return "-".join(f"{key}={value}" for key, value in case.items()).replace(" ", "") or "plain"


def check(ranks: Ranks, tmp_path: Path, world_size: int, changes: dict[str, Any]) -> None:
    config = load([], {**SMALL, **changes}, devices=world_size)
    config.write(tmp_path / "config.json")
    found: list[Measured] = ranks(measure, world_size, str(tmp_path / "config.json"))
    for one in found:
        estimate = estimate_stage(config, one.stage)
        for name, size in one.components.items():
            # abs: a pipeline stage has two numbers without meaning (megatron.engine.modules.stage_fillers).
            assert estimate.components.get(name, size) == pytest.approx(size, rel=0.02, abs=64), name
        if one.stage == 0:
            # What a forward pass leaves: activations of a micro-batch and the gradients that the loss makes at once.
            # (On later stages the first of it is what was received before.)
            moment = stage_moments(config, 0)["forward and backward pass"]
            under_way = min(config.batch.gradient_accumulation_steps, config.parallel.num_stages)
            left = moment["activations"] / under_way + moment["loss and head's gradient"]
            assert left == pytest.approx(one.forward, rel=0.1)
        assert estimate.tensors == pytest.approx(one.peak, rel=0.1), estimate
        assert one.start < one.peak


@pytest.mark.parametrize(("world_size", "changes"), QUICK, ids=name_of)
def test_the_plan_is_within_a_tenth_of_what_is_measured(
    ranks: Ranks, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    check(ranks, tmp_path, world_size, changes)


@pytest.mark.full
@pytest.mark.parametrize(("world_size", "changes"), MORE, ids=name_of)
def test_every_other_layout_and_architecture(
    ranks: Ranks, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    check(ranks, tmp_path, world_size, changes)


@pytest.mark.parametrize("changes", [{}, BRAIN, {"lora_rank": 4}], ids=name_of)
def test_zero_3_never_holds_the_whole_model(ranks: Ranks, tmp_path: Path, changes: dict[str, Any]) -> None:
    # Deep, so that the largest tensor, which is drawn whole, is small beside the model.
    config = load([], {**SMALL, **ZERO_3, **changes, "num_layers": 16}, devices=4)
    config.write(tmp_path / "config.json")
    for one in ranks(measure, 4, str(tmp_path / "config.json")):
        moments = stage_moments(config, 0)
        states = moments["optimizer step"]["weights"] + moments["optimizer step"]["fp32 master weights"]
        gradients = moments["optimizer step"]["gradients"]
        largest = 4 * max(512 * 96, 4 * 96 * 96)
        assert states <= one.start <= 1.05 * (states + gradients) + 3 * largest
        assert one.start < one.peak
