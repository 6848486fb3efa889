"""Small models whose every tensor matters, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import Piece, Reader, save
from megatron.model.build import HEAD, WORD_EMBEDDING, Transformer, build_model
from megatron.model.spec import ModelSpec
from megatron.parallel.sharding import get_shard_spec

BASE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 100, "vocab_size": 61,
    "padded_vocab_size": 64, "max_positions": 40, "rotary_dims": 4, "rotary_base": 1000.0, "residual": "parallel",
    "tied_head": False, "norm_eps": 1e-6,
}  # fmt: skip


def small_model(seed: int = 1, **changes: Any) -> Transformer:
    """A model with large random weights, biases and norms, so that a missing or swapped tensor shows."""
    model = build_model(ModelSpec(**(BASE | changes)), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 3 * parameter)
    return model


def save_model(root: Path, model: Transformer, step: int = 5, tp_size: int = 2, **state: Any) -> Reader:
    """A checkpoint of the weights as `tp_size` tensor-parallel ranks would write it."""
    pieces = []
    for name, parameter in model.named_parameters():
        spec = get_shard_spec(parameter)
        for tp_rank in range(tp_size):
            shard = spec.take(parameter.detach(), tp_rank, tp_size).contiguous()
            pieces.append(Piece.whole(name, "weight", spec, shard, tp_rank, tp_size))
    used_rows = {f"{name}.weight": model.spec.vocab_size for name in (WORD_EMBEDDING, HEAD)}
    save(root, step, pieces, {"model_spec": model.spec.to_dict(), **state}, used_rows=used_rows)
    return Reader(root / f"global_step{step}")
