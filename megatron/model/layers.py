"""The layers of a decoder-only transformer, from the token ids to the normed hidden states. Read from top to bottom.

No config, no DeepSpeed, no process-group look-up: sizes come from the ModelSpec, the groups are handed in. Every layer maps
hidden states to hidden states, so that a pipeline may cut between any two. Dropout is drawn from torch's default generator,
which is in step on all tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.model.spec import ModelSpec
from megatron.ops.activations import activation_function
from megatron.ops.attention import Attention
from megatron.ops.norms import layer_norm, rms_norm
from megatron.ops.rotary import RotaryTable, apply_rotary
from megatron.parallel.collectives import copy_to_tp, reduce_from_tp
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    sharded_parameter,
)
from megatron.parallel.process_groups import ProcessGroups


class KeyValueStore(Protocol):
    """What one attention layer needs of a cache: keep the new keys and values, give back all of them.

    Shapes: k, v [B, G, T, D] -> k, v [B, G, S, D] and a boolean mask [B, 1, T, S] (True = may be seen), or None for plain causal.
    """

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension; replicated on every tensor-parallel rank."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.is_rms = spec.norm == "rmsnorm"
        self.weight = sharded_parameter((spec.hidden_size,), None, 1)
        self.bias = None if self.is_rms else sharded_parameter((spec.hidden_size,), None, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_rms:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class WordEmbedding(VocabParallelEmbedding):
    """Token ids [B, T] to hidden states [B, T, H]."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__(spec.padded_vocab_size, spec.hidden_size, groups=groups)
        # With learned positions the dropout comes after the sum, in PositionEmbedding.
        self.dropout = spec.hidden_dropout if spec.position != "learned" else 0.0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(tokens), self.dropout, self.training)


class PositionEmbedding(nn.Module):
    """Add a learned vector per position (Radford et al. 2018)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dropout = spec.hidden_dropout
        self.offset = spec.position_offset
        self.weight = sharded_parameter((spec.max_positions + self.offset, spec.hidden_size), None, 1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: x [B, T, H], positions [B, T] or None for 0..T-1."""
        if positions is None:
            vectors = self.weight[self.offset : self.offset + x.shape[1]]
        else:
            vectors = F.embedding(positions + self.offset, self.weight)
        return F.dropout(x + vectors, self.dropout, self.training)


class SelfAttention(nn.Module):
    """Causal multi-head or grouped-query attention with rotary positions.

    Parallel: the heads are divided over the tensor-parallel ranks. The fused projection's rows are grouped by kv head,
    [G, N / G + 2, D]: the queries of the group, its key, its value; for G = N this is GPT-NeoX's and Hugging Face's order.
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, rotary: RotaryTable | None) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.num_kv_heads = spec.num_kv_heads // groups.tp_size
        self.group_size = spec.num_heads // spec.num_kv_heads
        self.rotary = rotary
        self.max_positions = spec.max_positions
        self.attention = Attention(dropout=spec.attention_dropout)
        qkv_size = spec.num_kv_heads * (self.group_size + 2) * spec.head_dim
        self.query_key_value = ColumnParallelLinear(spec.hidden_size, qkv_size, bias=spec.attention_bias, groups=groups)
        attended = spec.num_heads * spec.head_dim
        self.dense = RowParallelLinear(attended, spec.hidden_size, bias=spec.attention_bias, groups=groups)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        store: KeyValueStore | None = None,
        *,
        reduce: bool = True,
    ) -> torch.Tensor:
        """Shapes: x [B, T, H] -> [B, T, H]."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, self.num_kv_heads, self.group_size + 2, self.head_dim)
        q, k, v = qkv.split((self.group_size, 1, 1), dim=3)
        q = q.reshape(B, T, -1, self.head_dim).transpose(1, 2)  # [B, N, T, D]
        k = k.squeeze(3).transpose(1, 2)  # [B, G, T, D]
        v = v.squeeze(3).transpose(1, 2)
        if self.rotary is not None:
            if positions is not None:
                self.rotary.reserve(self.max_positions, x.device)
            cos, sin = self.rotary.at(T, positions, x.device)
            q, k = apply_rotary(q, k, cos, sin)
        mask = None
        if store is not None:
            k, v, mask = store.append(k, v)
        attended = self.attention(q, k, v, mask=mask, training=self.training)
        return self.dense(attended.transpose(1, 2).reshape(B, T, -1), reduce=reduce)


class MLP(nn.Module):
    """Two linear layers with an activation between, or a gated unit (Shazeer 2020, arXiv 2002.05202).

    Shapes: [B, T, H] -> [B, T, F / tp_size] -> [B, T, H].
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        H, F_ = spec.hidden_size, spec.ffn_size
        self.activation = activation_function(spec.activation)
        self.is_gated = spec.is_gated
        if self.is_gated:
            self.gate = ColumnParallelLinear(H, F_, bias=spec.mlp_bias, groups=groups)
            self.up = ColumnParallelLinear(H, F_, bias=spec.mlp_bias, groups=groups)
        else:
            self.linear1 = ColumnParallelLinear(H, F_, bias=spec.mlp_bias, groups=groups)
        self.linear2 = RowParallelLinear(F_, H, bias=spec.mlp_bias, groups=groups)

    def forward(self, x: torch.Tensor, *, reduce: bool = True) -> torch.Tensor:
        inner = self.activation(self.gate(x), self.up(x)) if self.is_gated else self.activation(self.linear1(x))
        return self.linear2(inner, reduce=reduce)


class TransformerBlock(nn.Module):
    """One transformer block, in one of three residual arrangements (ModelSpec.residual).

    Parallel: with a parallel residual the two partial sums share one all-reduce.
    """

    def __init__(
        self, spec: ModelSpec, groups: ProcessGroups, rotary: RotaryTable | None, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.residual = spec.residual
        self.dropout = spec.hidden_dropout
        self.recompute = recompute
        self.groups = groups
        self.input_layernorm = Norm(spec)
        self.attention = SelfAttention(spec, groups, rotary)
        # The tied form has no second norm of its own: both branches read the first one's output.
        self.post_attention_layernorm = Norm(spec) if spec.residual != "parallel_tied" else None
        self.mlp = MLP(spec, groups)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, store: KeyValueStore | None = None
    ) -> torch.Tensor:
        """Shapes: x [B, T, H] -> [B, T, H]."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, positions, store, use_reentrant=False)
        return self._forward(x, positions, store)

    def _forward(
        self, x: torch.Tensor, positions: torch.Tensor | None, store: KeyValueStore | None
    ) -> torch.Tensor:
        if self.residual == "sequential":
            assert self.post_attention_layernorm is not None
            x = x + self._drop(self.attention(self.input_layernorm(x), positions, store))
            return x + self._drop(self.mlp(self.post_attention_layernorm(x)))
        normed = self.input_layernorm(x)
        normed_mlp = normed if self.post_attention_layernorm is None else self.post_attention_layernorm(x)
        if self.groups.tp is None or self.dropout > 0.0:
            # Two dropout masks need two finished sums.
            return x + self._drop(self.attention(normed, positions, store)) + self._drop(self.mlp(normed_mlp))
        total = reduce_from_tp(
            self.attention(normed, positions, store, reduce=False) + self.mlp(normed_mlp, reduce=False), self.groups.tp
        )
        for bias in (self.attention.dense.bias, self.mlp.linear2.bias):
            if bias is not None:
                total = total + bias
        return x + total

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Head(nn.Module):
    """The output projection's weight [V, H]; divided over the tensor-parallel ranks along dim 0.

    It multiplies nothing itself: the objective takes hidden states and weight together, because loss and gradient are made chunk by
    chunk (megatron.ops.cross_entropy), and inference needs logits at the last position only.
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((spec.padded_vocab_size, spec.hidden_size), 0, groups.tp_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The identity, so that a pipeline may hold the head as its last layer. Shapes: [B, T, H] -> [B, T, H]."""
        return hidden


def project(hidden: torch.Tensor, weight: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """This rank's logits. Shapes: hidden [..., H], weight [V / tp_size, H] -> [..., V / tp_size]."""
    return F.linear(copy_to_tp(hidden, groups.tp), weight)
