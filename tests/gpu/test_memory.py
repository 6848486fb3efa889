"""The plan's memory against torch.cuda.max_memory_allocated, over a real step of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import load
from megatron.config.plan import estimate_memory
from tests.distributed.memory_cases import measure_on_gpu

# Large enough that the allocator's rounding to 512 bytes is nothing.
MEDIUM: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 1024,
    "padded_vocab_size": 50304,
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "not/needed.json",
    "pos_emb": "rotary",
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "precision": "bfloat16",
    "device": "cuda",
}
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "gpt_j_residual": False, "num_kv_heads": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16", "gradient_accumulation_steps": 1},
        {"recompute_activations": "full"},
        {"recompute_activations": "selective", "train_micro_batch_size_per_gpu": 8},
        LLAMA,
        {"zero_optimization": {"stage": 2}},
        {"hidden_dropout": 0.1},
    ],
    ids=str,
)
def test_the_peak_is_within_a_tenth(ranks: Callable[..., list[Any]], tmp_path: Path, changes: dict[str, Any]) -> None:
    config = load([], {**MEDIUM, **changes}, devices=1)
    config.write(tmp_path / "config.json")
    (peak,) = ranks(measure_on_gpu, 1, str(tmp_path / "config.json"), backend="nccl", timeout=300)
    assert estimate_memory(config).tensors == pytest.approx(peak, rel=0.1)
    assert peak < torch.cuda.get_device_properties(0).total_memory
