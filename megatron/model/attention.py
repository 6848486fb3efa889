"""Self-attention: projections, head norms, positions, cache; the kernel is megatron.ops.attention's.

Parallel: the heads are divided over the tensor-parallel ranks. Invariant: the function does not depend on how many
ranks divide them, nor on whether keys and values come from a cache.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from megatron.model.dropout import Dropout
from megatron.model.norms import Norm
from megatron.model.spec import ModelSpec
from megatron.ops.attention import Attention, Request, select
from megatron.ops.position_bias import alibi_bias, alibi_slopes, relative_positions, rpe_buckets
from megatron.ops.rotary import (
    RotaryTable,
    Stretch,
    apply_rotary,
    stretch_by_parts,
    stretch_by_wavelength,
    stretch_linearly,
)
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear, SharedColumnLinear, sharded_parameter
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream


class KeyValueStore(Protocol):
    """What one attention layer needs of a cache: keep the new keys and values, give back all of them.

    Shapes: k, v [B, G, T, D] -> k, v [B, G, S, D] and a boolean mask [B, 1, T, S] (True = may be seen), or None for
    plain causal. Slot s of a row holds the token at position s.
    """

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...


def rotary_table(spec: ModelSpec) -> RotaryTable | None:
    """The table that all layers of a model share, or None without rotary positions."""
    if spec.position != "rotary":
        return None
    scaling, stretch, amplitude = spec.rope_scaling, None, 1.0
    if scaling is not None:
        stretch = _stretch(spec)
        if scaling.kind == "yarn":
            factor = scaling.attention_factor
            amplitude = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0 if factor is None else factor
    return RotaryTable(
        spec.rotary_dims,
        spec.rotary_base,
        interleaved=spec.rotary_interleaved,
        stretch=stretch,
        amplitude=amplitude,
    )


def _stretch(spec: ModelSpec) -> Stretch:
    scaling = spec.rope_scaling
    assert scaling is not None
    match scaling.kind:
        case "linear":
            return lambda f: stretch_linearly(f, scaling.factor)
        case "llama3":
            return lambda f: stretch_by_wavelength(
                f, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions
            )
        case "yarn":
            return lambda f: stretch_by_parts(
                f, scaling.factor, scaling.beta_fast, scaling.beta_slow, spec.rotary_base, scaling.original_positions
            )


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket of distances (T5).

    Every layer has a table of its own: one that is shared by all, as upstream's, would be another model at every
    number of pipeline stages.
    Parallel: weight [buckets, N] divided along dim 1.
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = spec.rpe_buckets, spec.rpe_max_distance
        self.weight = sharded_parameter((spec.rpe_buckets, spec.num_heads), 1, groups.tp_size)

    def forward(self, relative: torch.Tensor) -> torch.Tensor:
        """Shapes: int64 [B, 1, T, S] -> [B, N / tp, T, S]."""
        buckets = rpe_buckets(relative.squeeze(1), self.num_buckets, self.max_distance)
        return self.weight[buckets].permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Causal multi-head or grouped-query attention.

    Multi-head: one fused projection, rows [N, 3, D], each head's query, key and value together: GPT-NeoX's and
    Hugging Face's order. Grouped-query: `query`, rows [N, D], and `key_value`, rows [G, 2, D], apart, because with
    more ranks than kv heads the first is still divided, while the second is replicated and each rank takes the kv
    head that its queries share.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: ProcessGroups,
        rotary: RotaryTable | None,
        stream: RandomStream | None = None,
        *,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.head_dim = spec.head_dim
        self.rotary = rotary
        self.max_positions = spec.max_positions
        self.window = window
        self.attention = Attention(dropout=spec.attention_dropout, scale=spec.attention_scale, window=window)
        self.dropout = Dropout(spec.attention_dropout, stream, is_divided=groups.tp_size > 1)
        self.is_fused = spec.num_kv_heads == spec.num_heads
        H, bias, attended = spec.hidden_size, bool(spec.qkv_bias), spec.num_heads * spec.head_dim
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
        self.query_norm = Norm(spec, groups, size=spec.head_dim, inside=True) if spec.qk_norm else None
        self.key_norm = Norm(spec, groups, size=spec.head_dim, inside=True) if spec.qk_norm else None
        self.slopes: torch.Tensor | None = None
        if spec.position == "alibi":
            heads = spec.num_heads // groups.tp_size
            # Plain values, wherever the parameters are made: on "meta" they would be lost.
            with torch.device("cpu"):
                self.slopes = alibi_slopes(spec.num_heads)[groups.tp_rank * heads :][:heads]
        self.rpe = RelativePositionBias(spec, groups) if spec.position == "rpe" else None
        self.dense = RowParallelLinear(attended, H, bias=spec.attention_bias, groups=groups)

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
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N or G, T, D]
        if self.rotary is not None:
            if positions is not None:
                self.rotary.reserve(self.max_positions, x.device)
            cos, sin = self.rotary.at(T, positions, x.device)
            q, k = apply_rotary(q, k, cos, sin, interleaved=self.rotary.interleaved)
        mask = None
        if store is not None:
            k, v, mask = store.append(k, v)
        if mask is not None and self.window is not None:
            # Rows end at different slots: the window counts from each row's own.
            assert positions is not None
            slots = torch.arange(k.shape[2], device=x.device)
            mask = mask & (slots >= positions[:, None, :, None] - self.window)
        bias, slopes = self._bias(T, k.shape[2], positions, store is not None, x)
        with self.dropout.drawing():
            attended = self.attention(q, k, v, mask=mask, bias=bias, slopes=slopes, training=self.training)
        return attended.transpose(1, 2).reshape(B, T, -1)

    def choose(self, backend: str, device_type: str, dtype: torch.dtype) -> None:
        """Compute with this backend. Raises: ConfigError if it cannot train this layer there."""
        dropout, scale = self.attention.dropout, self.attention.scale
        request = Request(
            device_type, dtype, self.head_dim, 1, 1,
            window=self.window is not None, bias=self.rpe is not None, alibi=self.slopes is not None,
            dropout=dropout > 0,
        )  # fmt: skip
        if backend != "auto":
            select(request, backend)
        self.attention = Attention(dropout=dropout, scale=scale, window=self.window, backend=backend)

    def _bias(
        self, T: int, S: int, positions: torch.Tensor | None, is_cached: bool, x: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What relative positions add to the scores: a whole bias, or slopes for a kernel to make it of."""
        if self.slopes is None and self.rpe is None:
            return None, None
        if self.slopes is not None and positions is None:
            return None, self.slopes
        queries = torch.arange(S - T, S, device=x.device)[None] if positions is None else positions
        keys = torch.arange(S, device=x.device)[None] if is_cached or positions is None else positions
        relative = relative_positions(queries, keys)
        if self.rpe is not None:
            return self.rpe(relative), None
        assert self.slopes is not None
        return alibi_bias(self.slopes.to(x.device), relative), None
