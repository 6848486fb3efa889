"""The layers of a decoder-only transformer, from the token ids to the normed hidden states. Read from top to bottom.

No config, no DeepSpeed, no process-group look-up: sizes come from the ModelSpec, the groups are handed in. Every
layer maps hidden states to hidden states, so that a pipeline may cut between any two. With sequence parallelism T is
this rank's share of the tokens outside of tensor-parallel regions. Dropout draws from
megatron.parallel.random_streams.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from megatron.model.recompute import recomputed
from megatron.model.spec import ModelSpec
from megatron.ops.activations import activation_function
from megatron.ops.attention import Attention
from megatron.ops.norms import layer_norm, rms_norm
from megatron.ops.rotary import RotaryTable, apply_rotary
from megatron.parallel.collectives import (
    enter_region,
    gather_sequence,
    leave_region,
    shared_parameter,
    split_sequence,
)
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SharedColumnLinear,
    VocabParallelEmbedding,
    sharded_parameter,
)
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream


class KeyValueStore(Protocol):
    """What one attention layer needs of a cache: keep the new keys and values, give back all of them.

    Shapes: k, v [B, G, T, D] -> k, v [B, G, S, D] and a boolean mask [B, 1, T, S] (True = may be seen), or None for
    plain causal.
    """

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...


class Dropout:
    """Zero a part of the elements in training, and scale up the rest.

    is_divided: the tensor is another one on each tensor-parallel rank, so each draws numbers of its own.
    """

    def __init__(self, probability: float, stream: RandomStream | None, *, is_divided: bool) -> None:
        self.probability = probability
        self.stream = stream if is_divided else None

    def __call__(self, x: torch.Tensor, is_training: bool) -> torch.Tensor:
        if not self.probability or not is_training:
            return x
        with self.drawing():
            return F.dropout(x, self.probability)

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """Within, torch draws from the right stream."""
        if self.stream is None or not self.probability:
            return contextlib.nullcontext()
        return self.stream.switched_in()


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension; replicated on every tensor-parallel rank."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.groups = groups
        self.is_rms = spec.norm == "rmsnorm"
        self.weight = sharded_parameter((spec.hidden_size,), None, 1)
        self.bias = None if self.is_rms else sharded_parameter((spec.hidden_size,), None, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = shared_parameter(self.weight, self.groups)
        if self.bias is None:
            return rms_norm(x, weight, self.eps)
        return layer_norm(x, weight, shared_parameter(self.bias, self.groups), self.eps)


class WordEmbedding(VocabParallelEmbedding):
    """Token ids [B, T] to hidden states [B, T, H]."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, stream: RandomStream | None = None) -> None:
        super().__init__(spec.padded_vocab_size, spec.hidden_size, groups=groups)
        # With learned positions the dropout comes after the sum, in PositionEmbedding.
        probability = spec.hidden_dropout if spec.position != "learned" else 0.0
        self.dropout = Dropout(probability, stream, is_divided=groups.sequence_parallel)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.dropout(super().forward(tokens), self.training)


class PositionEmbedding(nn.Module):
    """Add a learned vector per position (Radford et al. 2018)."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, stream: RandomStream | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.dropout = Dropout(spec.hidden_dropout, stream, is_divided=groups.sequence_parallel)
        self.offset = spec.position_offset
        self.weight = sharded_parameter((spec.max_positions + self.offset, spec.hidden_size), None, 1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: x [B, T, H], positions [B, S] or None for 0..S-1, over whole sequences."""
        if positions is None:
            tokens = x.shape[1] * (self.groups.tp_size if self.groups.sequence_parallel else 1)
            vectors = self.weight[self.offset : self.offset + tokens].unsqueeze(0)
        else:
            vectors = F.embedding(positions + self.offset, self.weight)
        return self.dropout(x + split_sequence(vectors, self.groups), self.training)


class SelfAttention(nn.Module):
    """Causal multi-head or grouped-query attention with rotary positions.

    Parallel: the heads are divided over the tensor-parallel ranks.
    Multi-head: one fused projection, rows [N, 3, D], each head's query, key and value together: GPT-NeoX's and
    Hugging Face's order. Grouped-query: `query`, rows [N, D], and `key_value`, rows [G, 2, D], apart, because with
    more ranks than kv heads the first is still divided, while the second is replicated and each rank takes the kv
    head that its queries share.
    """

    def __init__(
        self, spec: ModelSpec, groups: ProcessGroups, rotary: RotaryTable | None, stream: RandomStream | None = None
    ) -> None:
        super().__init__()
        self.groups = groups
        self.head_dim = spec.head_dim
        self.num_kv_heads = spec.kv_heads_on_rank(groups.tp_size)
        self.rotary = rotary
        self.max_positions = spec.max_positions
        self.attention = Attention(dropout=spec.attention_dropout)
        self.dropout = Dropout(spec.attention_dropout, stream, is_divided=groups.tp_size > 1)
        self.is_fused = spec.num_kv_heads == spec.num_heads
        H, bias, attended = spec.hidden_size, spec.attention_bias, spec.num_heads * spec.head_dim
        if self.is_fused:
            self.query_key_value = ColumnParallelLinear(H, 3 * attended, bias=bias, groups=groups)
        else:
            G, kv_size = spec.num_kv_heads, 2 * spec.num_kv_heads * spec.head_dim
            self.query = ColumnParallelLinear(H, attended, bias=bias, groups=groups)
            self.key_value: nn.Module = (
                ColumnParallelLinear(H, kv_size, bias=bias, groups=groups)
                if G % groups.tp_size == 0
                else SharedColumnLinear(H, kv_size, G, bias=bias, groups=groups)
            )
        self.dense = RowParallelLinear(attended, H, bias=bias, groups=groups)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, store: KeyValueStore | None = None
    ) -> torch.Tensor:
        """What enters `dense`, of normed hidden states within the region. Shapes: x [B, T, H] -> [B, T, N / tp * D]."""
        B, T, _ = x.shape
        if self.is_fused:
            q, k, v = self.query_key_value(x).view(B, T, -1, 3, self.head_dim).unbind(3)
        else:
            q = self.query(x).view(B, T, -1, self.head_dim)
            k, v = self.key_value(x).view(B, T, -1, 2, self.head_dim).unbind(3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N or G, T, D]
        if self.rotary is not None:
            if positions is not None:
                self.rotary.reserve(self.max_positions, x.device)
            cos, sin = self.rotary.at(T, positions, x.device)
            q, k = apply_rotary(q, k, cos, sin)
        mask = None
        if store is not None:
            k, v, mask = store.append(k, v)
        with self.dropout.drawing():
            attended = self.attention(q, k, v, mask=mask, training=self.training)
        return attended.transpose(1, 2).reshape(B, T, -1)


class MLP(nn.Module):
    """Two linear layers with an activation between, or a gated unit (Shazeer 2020, arXiv 2002.05202)."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What enters `linear2`, of hidden states within the region. Shapes: x [B, T, H] -> [B, T, F / tp]."""
        return self.activation(self.gate(x), self.up(x)) if self.is_gated else self.activation(self.linear1(x))


class TransformerBlock(nn.Module):
    """One transformer block, in one of three residual arrangements (ModelSpec.residual).

    Parallel: with a parallel residual the two partial sums share one reduction.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: ProcessGroups,
        rotary: RotaryTable | None,
        stream: RandomStream | None = None,
        *,
        recompute_attention: bool = False,
    ) -> None:
        super().__init__()
        self.residual = spec.residual
        self.dropout = Dropout(spec.hidden_dropout, stream, is_divided=groups.sequence_parallel)
        self.recompute_attention = recompute_attention
        self.stream = stream
        self.groups = groups
        self.input_layernorm = Norm(spec, groups)
        self.attention = SelfAttention(spec, groups, rotary, stream)
        # The tied form has no second norm of its own: both branches read the first one's output.
        self.post_attention_layernorm = Norm(spec, groups) if spec.residual != "parallel_tied" else None
        self.mlp = MLP(spec, groups)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, store: KeyValueStore | None = None
    ) -> torch.Tensor:
        """Shapes: x [B, T, H] -> [B, T, H]."""
        if self.residual == "sequential":
            assert self.post_attention_layernorm is not None
            attended = self._attend(self._enter(self.input_layernorm(x)), positions, store)
            x = x + self._drop(self.attention.dense(attended))
            return x + self._drop(self.mlp.linear2(self.mlp(self._enter(self.post_attention_layernorm(x)))))
        normed = self._enter(self.input_layernorm(x))
        normed_mlp = normed if self.post_attention_layernorm is None else self._enter(self.post_attention_layernorm(x))
        attended, inner = self._attend(normed, positions, store), self.mlp(normed_mlp)
        dense, linear2 = self.attention.dense, self.mlp.linear2
        if self.groups.tp is None or self.dropout.probability:
            # Two dropout masks need two finished sums.
            return x + self._drop(dense(attended)) + self._drop(linear2(inner))
        total = leave_region(dense.partial(attended) + linear2.partial(inner), self.groups)
        return x + linear2.add_bias(dense.add_bias(total))

    def _attend(
        self, x: torch.Tensor, positions: torch.Tensor | None, store: KeyValueStore | None
    ) -> torch.Tensor:
        if self.recompute_attention and self.training and store is None:
            return recomputed(self.attention, self.stream, x, positions)
        return self.attention(x, positions, store)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        return enter_region(x, self.groups)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x, self.training)


class Head(nn.Module):
    """The output projection's weight [V, H]; divided over the tensor-parallel ranks along dim 0.

    It multiplies nothing itself: the objective takes hidden states and weight together, because loss and gradient are
    made chunk by chunk (megatron.ops.cross_entropy), and inference needs logits at the last position only.
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((spec.padded_vocab_size, spec.hidden_size), 0, groups.tp_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The identity, so that a pipeline may hold the head as its last layer. Shapes: [B, T, H] -> [B, T, H]."""
        return hidden


def whole_sequences(hidden: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """The normed hidden states as the loss takes them: all tokens on every rank. Shapes: -> [B, S, H]."""
    return gather_sequence(hidden, groups)
