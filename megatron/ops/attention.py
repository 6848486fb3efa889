"""Causal attention behind one signature, with backends that state what they can do.

`eager` computes the softmax in fp32 and is the oracle of the others; `sdpa` is torch's fused attention. Not here:
projections, positions, caches. Invariant: every backend gives what `eager` gives; a query that sees nothing gets zero.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.common.errors import ConfigError

logger = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = frozenset({*HALF, torch.float32, torch.float64})


@dataclass(frozen=True)
class Request:
    """What a backend is asked for. `cache`: fewer queries than keys; `window`, `mask`, `dropout`: whether in use."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    cache: bool = False
    window: bool = False
    mask: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and its limits. `max_head_dim` None: any; `device_types` None: any."""

    name: str
    run: Callable[..., Tensor]
    dtypes: frozenset[torch.dtype] = FLOATS
    max_head_dim: int | None = None
    device_types: frozenset[str] | None = None
    gqa: bool = True
    cache: bool = True
    window: bool = True
    mask: bool = True
    dropout: bool = True

    def lacks(self, request: Request) -> str | None:
        """Why this backend cannot serve the request, or None if it can."""
        if self.device_types is not None and request.device_type not in self.device_types:
            return f"it does not run on {request.device_type}"
        if request.dtype not in self.dtypes:
            return f"it does not take {request.dtype}"
        if self.max_head_dim is not None and request.head_dim > self.max_head_dim:
            return f"its largest head dimension is {self.max_head_dim}, here it is {request.head_dim}"
        if request.num_kv_heads != request.num_heads and not self.gqa:
            return "it does not share keys and values between heads"
        for feature in ("cache", "window", "mask", "dropout"):
            if getattr(request, feature) and not getattr(self, feature):
                return f"it has no {feature}"
        return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "sdpa",
) -> Tensor:
    """`softmax(q k^T * scale) v`; `scale` defaults to 1 / sqrt(D).

    Shapes: q [B, N, T, D]; k, v [B, G, S, D] with G a divisor of N and T <= S; result [B, N, T, D].
    causal: query i sees the keys up to S - T + i, so that new queries continue a cache.
    window: a query sees itself and that many tokens before it (upstream's sliding_window_width).
    key_lengths: int [B], how many leading keys of a static cache are real; the causal limit counts from that end.
    mask: bool [B, 1, T, S] or broadcastable, True where a key may be seen; combined with all of the above.
    dropout_p: probability of dropping an attention weight; pass 0 when not training.
    """
    return BACKENDS[backend].run(q, k, v, causal, scale, window, mask, key_lengths, dropout_p)


class Attention:
    """Attention of one layer: picks the backend for the first tensors it sees, says why in the log, and keeps to it."""

    def __init__(
        self, *, dropout: float = 0.0, scale: float | None = None, window: int | None = None, backend: str = "auto"
    ) -> None:
        self.dropout = dropout
        self.scale = scale
        self.window = window
        self.asked = backend
        self._chosen: dict[Request, Backend] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, training: bool = False
    ) -> Tensor:
        """Shapes as in `attention`. Causal without a mask; a mask alone decides what is seen (but for the window)."""
        dropout_p = self.dropout if training else 0.0
        if torch.compiler.is_compiling() and self.asked in ("auto", "sdpa"):
            # The table of choices is not for tracing; torch's fused attention is what a compiler knows best.
            return _sdpa(q, k, v, mask is None, self.scale, self.window, mask, None, dropout_p)
        request = Request(
            q.device.type, q.dtype, q.shape[3], q.shape[1], k.shape[1],
            cache=q.shape[2] < k.shape[2], window=self.window is not None, mask=mask is not None, dropout=dropout_p > 0,
        )  # fmt: skip
        chosen = self._chosen.get(request)
        if chosen is None:
            chosen = self._chosen[request] = select(request, self.asked)
        return chosen.run(q, k, v, mask is None, self.scale, self.window, mask, None, dropout_p)


def select(request: Request, asked: str = "auto") -> Backend:
    """The backend that serves the request: the one asked for, or with "auto" the first of BACKENDS' order that can.

    Raises: ConfigError for an unknown name, or for a named backend that lacks something. Nothing is replaced silently.
    """
    if asked != "auto":
        backend = BACKENDS.get(asked)
        if backend is None:
            raise ConfigError(f"attention backend {asked!r} is not known. Use one of: auto, {', '.join(BACKENDS)}.")
        reason = backend.lacks(request)
        if reason is not None:
            raise ConfigError(f"attention backend {asked!r} cannot serve this model: {reason}. Use auto.")
        return backend
    passed_over: list[str] = []
    for backend in BACKENDS.values():
        reason = backend.lacks(request)
        if reason is None:
            why = f" ({'; '.join(passed_over)})" if passed_over else ""
            _log_once(f"attention: {backend.name} for {request.dtype} on {request.device_type}{why}")
            return backend
        passed_over.append(f"not {backend.name}: {reason}")
    raise ConfigError(f"no attention backend serves this model: {'; '.join(passed_over)}.")


def visible(
    T: int,
    S: int,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """The boolean mask of everything that limits sight, broadcastable to [B, 1, T, S], or None if all is seen."""
    keys = torch.arange(S, device=device)
    if key_lengths is None:
        last = torch.arange(S - T, S, device=device).view(1, 1, T, 1)
    else:
        lengths = key_lengths.to(device).view(-1, 1, 1, 1)
        last = lengths - T + torch.arange(T, device=device).view(1, 1, T, 1)
        allowed = keys < lengths
        mask = allowed if mask is None else mask & allowed
    # A single query at the end sees every key there is: no causal mask is needed.
    if causal and (T > 1 or key_lengths is not None):
        allowed = keys <= last
        mask = allowed if mask is None else mask & allowed
    if window is not None and window < S:
        allowed = keys >= last - window
        mask = allowed if mask is None else mask & allowed
    return mask


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
) -> Tensor:
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (D**-0.5 if scale is None else scale)
    mask = visible(T, S, causal, window, mask, key_lengths, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(3).masked_fill(~mask.any(3, keepdim=True), 0.0)
    else:
        weights = scores.softmax(3)
    return F.dropout(weights, dropout_p).to(v.dtype) @ v


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
) -> Tensor:
    B, N, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    is_plain = causal and T == S and mask is None and key_lengths is None and (window is None or window >= S)
    if is_plain and T > 1:
        if G != N and _HAS_GQA:
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=True
            )
        k, v = _expand(k, N), _expand(v, N)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    mask = visible(T, S, causal, window, mask, key_lengths, q.device)
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


def _expand(x: Tensor, num_heads: int) -> Tensor:
    """[B, G, S, D] -> [B, N, S, D], each kv head repeated for the queries of its group."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def _takes_gqa() -> bool:
    try:
        return "enable_gqa" in inspect.signature(F.scaled_dot_product_attention).parameters
    except (TypeError, ValueError):  # a builtin without a signature: its docstring names the arguments
        return "enable_gqa" in (F.scaled_dot_product_attention.__doc__ or "")


_HAS_GQA = _takes_gqa()
_logged: set[str] = set()

BACKENDS: dict[str, Backend] = {
    "sdpa": Backend("sdpa", _sdpa),
    "eager": Backend("eager", _eager),
}
