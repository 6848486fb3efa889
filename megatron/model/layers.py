"""The layers of a decoder-only transformer, from the token ids to the normed hidden states. Read from top to bottom.

No config, no DeepSpeed, no process-group look-up: sizes come from the ModelSpec, the groups are handed in. Every
layer maps hidden states to hidden states, so that a pipeline may cut between any two. With sequence parallelism T is
this rank's share of the tokens outside of tensor-parallel regions. Dropout draws from
megatron.parallel.random_streams.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from megatron.model.attention import KeyValueStore, SelfAttention
from megatron.model.dropout import Dropout
from megatron.model.lora import add_updates
from megatron.model.norms import Norm
from megatron.model.recompute import recomputed
from megatron.model.spec import ModelSpec
from megatron.ops.activations import activation_function
from megatron.ops.position_bias import sinusoids
from megatron.ops.rotary import RotaryTable
from megatron.parallel.collectives import enter_region, leave_region, split_sequence
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    sharded_parameter,
)
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream


class WordEmbedding(VocabParallelEmbedding):
    """Token ids [B, T] to hidden states [B, T, H]."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, stream: RandomStream | None = None) -> None:
        if spec.soft_prompt is not None:
            # The prompt's layer divides the sequence, when both are together.
            groups = replace(groups, sequence_parallel=False)
        super().__init__(spec.padded_vocab_size, spec.hidden_size, groups=groups)
        # Dropout is the last layer's business: of those that add positions or a prompt, where there are any.
        probability = 0.0 if spec.has_position_layer or spec.soft_prompt is not None else spec.hidden_dropout
        self.dropout = Dropout(probability, stream, is_divided=groups.sequence_parallel)
        self.scale = spec.input_scale

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        vectors = super().forward(tokens)
        return self.dropout(vectors if self.scale == 1.0 else vectors * self.scale, self.training)


class PositionEmbedding(nn.Module):
    """Add a vector per position: a learned one (Radford et al. 2018), or sines and cosines."""

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, stream: RandomStream | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.hidden_size = spec.hidden_size
        self.dropout = Dropout(spec.hidden_dropout, stream, is_divided=groups.sequence_parallel)
        self.offset = spec.position_offset
        self.scale = spec.position_scale
        rows = spec.max_positions + self.offset
        self.weight = sharded_parameter((rows, spec.hidden_size), None, 1) if spec.position == "learned" else None

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: x [B, T, H], positions [B, S] or None for 0..S-1, over whole sequences."""
        tokens = x.shape[1] * (self.groups.tp_size if self.groups.sequence_parallel else 1)
        if self.weight is None:
            places = torch.arange(tokens, device=x.device)[None] if positions is None else positions
            vectors = sinusoids(places, self.hidden_size).to(x.dtype)
        elif positions is None:
            vectors = self.weight[self.offset : self.offset + tokens].unsqueeze(0)
        else:
            vectors = F.embedding(positions + self.offset, self.weight)
        if self.scale != 1.0:
            vectors = vectors * self.scale
        return self.dropout(x + split_sequence(vectors, self.groups), self.training)


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
        layer: int = 0,
        recompute_attention: bool = False,
    ) -> None:
        super().__init__()
        self.residual = spec.residual
        self.dropout = Dropout(spec.hidden_dropout, stream, is_divided=groups.sequence_parallel)
        self.recompute_attention = recompute_attention
        self.stream = stream
        self.groups = groups
        self.input_layernorm = Norm(spec, groups)
        self.attention = SelfAttention(spec, groups, rotary, stream, window=spec.layer_window(layer))
        # The tied form has no second norm of its own: both branches read the first one's output.
        self.post_attention_layernorm = Norm(spec, groups) if spec.residual != "parallel_tied" else None
        self.mlp = MLP(spec, groups)
        add_updates(self, spec, groups, stream)

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

    def _attend(self, x: torch.Tensor, positions: torch.Tensor | None, store: KeyValueStore | None) -> torch.Tensor:
        if self.recompute_attention and self.training and store is None:
            return recomputed(self.attention, self.stream, x, positions)
        return self.attention(x, positions, store)

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        return enter_region(x, self.groups)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x, self.training)


class Head(nn.Module):
    """The output projection's weight [V, H], and bias [V] where it has one; V is num_labels where the task is another
    than predicting tokens.

    Parallel: both are divided over the tensor-parallel ranks along dim 0; a head of labels is replicated.

    It multiplies nothing itself: the objective takes hidden states and weight together, because loss and gradient are
    made chunk by chunk (megatron.ops.cross_entropy), and inference needs logits at the last position only.
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        rows, dim = (spec.padded_vocab_size, 0) if spec.task == "causal_lm" else (spec.num_labels, None)
        self.weight = sharded_parameter((rows, spec.hidden_size), dim, groups.tp_size)
        self.bias = sharded_parameter((rows,), dim, groups.tp_size) if spec.head_bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The identity, so that a pipeline may hold the head as its last layer. Shapes: [B, T, H] -> [B, T, H]."""
        return hidden
