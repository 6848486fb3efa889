"""The ways to compute attention: eager (the oracle), torch's fused kernel, FlexAttention, flash-attn.

Each takes `(q, k, v, sight, scale, dropout_p)` and nothing else. Which of them serves a request is decided in
megatron.ops.attention. Invariant: every one gives what `eager` gives; a query that sees nothing gets zero.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.position_bias import alibi_bias


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, and what is added to its scores; T queries are the last of S keys.

    causal: query i sees the keys up to S - T + i. window: itself and that many keys before it.
    mask: bool [B, 1, T, S] or broadcastable, True where a key may be seen; combined with all else.
    key_lengths: int [B], how many leading keys are real; the causal limit counts from that end.
    bias: [B or 1, N, T, S], added to the scaled scores. slopes: fp32 [N], ALiBi: slope * (key - query) is added.
    """

    causal: bool = True
    window: int | None = None
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None

    def last(self, T: int, S: int, device: torch.device) -> Tensor:
        """The key that stands at each query's own place. Shapes: -> [B or 1, 1, T, 1]."""
        if self.key_lengths is None:
            return torch.arange(S - T, S, device=device).view(1, 1, T, 1)
        lengths = self.key_lengths.to(device).view(-1, 1, 1, 1)
        return lengths - T + torch.arange(T, device=device).view(1, 1, T, 1)

    def visible(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """Everything that limits sight as one mask, broadcastable to [B, 1, T, S], or None if all is seen."""
        keys, last, mask = torch.arange(S, device=device), self.last(T, S, device), self.mask
        if self.key_lengths is not None:
            allowed = keys < self.key_lengths.to(device).view(-1, 1, 1, 1)
            mask = allowed if mask is None else mask & allowed
        # A single query at the end sees every key there is: no causal mask is needed.
        if self.causal and (T > 1 or self.key_lengths is not None):
            allowed = keys <= last
            mask = allowed if mask is None else mask & allowed
        if self.window is not None and self.window < S:
            allowed = keys >= last - self.window
            mask = allowed if mask is None else mask & allowed
        return mask

    def added(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """What is added to the scores, broadcastable to [B, N, T, S], or None."""
        if self.slopes is None:
            return self.bias
        relative = torch.arange(S, device=device) - self.last(T, S, device)
        bias = alibi_bias(self.slopes.to(device), relative)
        return bias if self.bias is None else bias + self.bias

    def is_plain(self, T: int, S: int) -> bool:
        """Whether causality is all there is, over as many queries as keys."""
        free = self.mask is None and self.key_lengths is None and self.bias is None and self.slopes is None
        return free and self.causal and T == S and (self.window is None or self.window >= S)


def eager(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float | None, dropout_p: float) -> Tensor:
    """Scores and softmax in fp32, written out."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (D**-0.5 if scale is None else scale)
    added, mask = sight.added(T, S, q.device), sight.visible(T, S, q.device)
    if added is not None:
        scores = scores + added
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(3).masked_fill(~mask.any(3, keepdim=True), 0.0)
    else:
        weights = scores.softmax(3)
    return F.dropout(weights, dropout_p).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float | None, dropout_p: float) -> Tensor:
    """torch's fused attention."""
    B, N, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    if sight.is_plain(T, S) and T > 1:
        if G != N and _HAS_GQA:
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=True
            )
        k, v = _expand(k, N), _expand(v, N)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    mask, added = sight.visible(T, S, q.device), sight.added(T, S, q.device)
    if added is not None:
        # Added in fp32, rounded once: the kernel wants the queries' dtype.
        joint = added if mask is None else added.masked_fill(~mask, float("-inf"))
        joint = joint.to(q.dtype).expand(B, N, T, S)
        if T == 1 and G != N:
            return F.scaled_dot_product_attention(
                q.reshape(B, G, N // G, D), k, v,
                attn_mask=joint.reshape(B, G, N // G, S), dropout_p=dropout_p, scale=scale,
            ).reshape(B, N, T, D)  # fmt: skip
        return F.scaled_dot_product_attention(
            q, _expand(k, N), _expand(v, N), attn_mask=joint, dropout_p=dropout_p, scale=scale
        )
    if G != N and T == 1 and (mask is None or mask.shape[-3] == 1):
        # The queries of a group are as good as positions of one head: keys and values are read once, and not copied.
        out = F.scaled_dot_product_attention(
            q.reshape(B, G, N // G, D), k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale
        )
        return out.reshape(B, N, T, D)
    if G != N:
        # With a mask, enable_gqa would lead CUDA to the unfused kernel.
        k, v = _expand(k, N), _expand(v, N)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def flex(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float | None, dropout_p: float) -> Tensor:
    """FlexAttention: blocks of keys beyond the window are not read, ALiBi is made in the kernel, no mask exists."""
    assert sight.mask is None
    assert sight.key_lengths is None
    assert sight.bias is None
    assert not dropout_p
    T, S, slopes = q.shape[2], k.shape[2], sight.slopes
    score_mod = None
    if slopes is not None:
        slopes = slopes.to(q.device)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            return score + slopes[h] * (k_index - q_index - (S - T))

    window = None if sight.window is None or sight.window >= S else sight.window
    return _compiled_flex()(
        q, k, v,
        score_mod=score_mod, block_mask=_block_mask(T, S, sight.causal, window, str(q.device)),
        scale=scale, enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(T: int, S: int, causal: bool, window: int | None, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        own = q_index + (S - T)
        allowed = k_index <= own if causal else k_index >= 0
        return allowed if window is None else allowed & (k_index >= own - window)

    return create_block_mask(sees, None, None, T, S, device=device)


def flash(q: Tensor, k: Tensor, v: Tensor, sight: Sight, scale: float | None, dropout_p: float) -> Tensor:
    """The flash-attn package (version 2.4 or later)."""
    assert sight.mask is None
    assert sight.key_lengths is None
    assert sight.bias is None
    left = -1 if sight.window is None else sight.window
    slopes = None if sight.slopes is None else sight.slopes.to(q.device)
    # It wants [B, T, N, D], and aligns the last query with the last key as we do.
    out = _flash_attn().flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        dropout_p=dropout_p, softmax_scale=scale, causal=sight.causal,
        window_size=(left, 0 if sight.causal and left >= 0 else -1), alibi_slopes=slopes,
    )  # fmt: skip
    return out.transpose(1, 2)


@cache
def has_flash() -> bool:
    """Whether the flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


@cache
def _flash_attn() -> Any:
    return importlib.import_module("flash_attn")


def _expand(x: Tensor, num_heads: int) -> Tensor:
    """[B, G, S, D] -> [B, N, S, D], each kv head repeated for the queries of its group."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _takes_gqa() -> bool:
    try:
        return "enable_gqa" in inspect.signature(F.scaled_dot_product_attention).parameters
    except (TypeError, ValueError):  # a builtin without a signature: its docstring names the arguments
        return "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")


_HAS_GQA = _takes_gqa()
