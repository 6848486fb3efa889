"""Causal attention behind one signature, with backends that state what they can do.

`eager` computes the softmax in fp32 and is the oracle of the others; `sdpa` is torch's fused attention; `flex` serves
windows and ALiBi on CUDA; `flash` is the flash-attn package, where it is installed. Not here: projections, positions,
caches. Invariant: nothing is replaced silently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.common.errors import ConfigError
from megatron.ops.attention_backends import Sight, eager, flash, flex, has_flash, sdpa

logger = logging.getLogger(__name__)

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = frozenset({*HALF, torch.float32, torch.float64})


@dataclass(frozen=True)
class Request:
    """What a backend is asked for. `cache`: fewer queries than keys; the others: whether in use."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    num_heads: int
    num_kv_heads: int
    cache: bool = False
    window: bool = False
    mask: bool = False
    bias: bool = False
    alibi: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and its limits. `max_head_dim` None: any; `device_types` None: any.

    is_installed: whether this machine has its `package`. for_masks_only: no better than the next where nothing limits
    sight.
    """

    name: str
    run: Callable[..., Tensor]
    dtypes: frozenset[torch.dtype] = FLOATS
    max_head_dim: int | None = None
    device_types: frozenset[str] | None = None
    gqa: bool = True
    cache: bool = True
    window: bool = True
    mask: bool = True
    bias: bool = True
    alibi: bool = True
    dropout: bool = True
    is_installed: Callable[[], bool] = lambda: True
    package: str = ""
    for_masks_only: bool = False

    def lacks(self, request: Request) -> str | None:
        """Why this backend cannot serve the request, or None if it can."""
        if self.device_types is not None and request.device_type not in self.device_types:
            return f"it does not run on {request.device_type}"
        if not self.is_installed():
            return f"{self.package} is not installed"
        if request.dtype not in self.dtypes:
            return f"it does not take {request.dtype}"
        if self.max_head_dim is not None and request.head_dim > self.max_head_dim:
            return f"its largest head dimension is {self.max_head_dim}, here it is {request.head_dim}"
        if request.num_kv_heads != request.num_heads and not self.gqa:
            return "it does not share keys and values between heads"
        for feature in ("cache", "window", "mask", "bias", "alibi", "dropout"):
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
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "sdpa",
) -> Tensor:
    """`softmax(q k^T * scale + bias) v`; `scale` defaults to 1 / sqrt(D).

    Shapes: q [B, N, T, D]; k, v [B, G, S, D] with G a divisor of N and T <= S; result [B, N, T, D].
    causal, window, mask, key_lengths, bias, slopes: as in `Sight`.
    dropout_p: probability of dropping an attention weight; pass 0 when not training.
    """
    sight = Sight(causal, window, mask, key_lengths, bias, slopes)
    return BACKENDS[backend].run(q, k, v, sight, scale, dropout_p)


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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
        training: bool = False,
    ) -> Tensor:
        """Shapes as in `attention`. Causal without a mask; a mask alone decides what is seen, window included."""
        dropout_p = self.dropout if training else 0.0
        sight = Sight(mask is None, self.window if mask is None else None, mask, None, bias, slopes)
        if torch.compiler.is_compiling() and self.asked in ("auto", "sdpa"):
            # The table of choices is not for tracing; torch's fused attention is what a compiler knows best.
            return sdpa(q, k, v, sight, self.scale, dropout_p)
        request = Request(
            q.device.type, q.dtype, q.shape[3], q.shape[1], k.shape[1],
            cache=q.shape[2] < k.shape[2], window=sight.window is not None, mask=mask is not None,
            bias=bias is not None, alibi=slopes is not None, dropout=dropout_p > 0,
        )  # fmt: skip
        chosen = self._chosen.get(request)
        if chosen is None:
            chosen = self._chosen[request] = select(request, self.asked)
        return chosen.run(q, k, v, sight, self.scale, dropout_p)


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
        if backend.for_masks_only and not (request.window or request.alibi):
            continue
        if reason is None:
            # That a CPU has no CUDA kernels is no news.
            told = [words for words in passed_over if "does not run on" not in words]
            why = f" ({'; '.join(told)})" if told else ""
            _log_once(f"attention: {backend.name} for {request.dtype} on {request.device_type}{why}")
            return backend
        passed_over.append(f"not {backend.name}: {reason}")
    raise ConfigError(f"no attention backend serves this model: {'; '.join(passed_over)}.")


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


_logged: set[str] = set()

_CUDA = frozenset({"cuda"})
# In the order of preference.
BACKENDS: dict[str, Backend] = {
    "flash": Backend(
        "flash", flash, dtypes=HALF, max_head_dim=256, device_types=_CUDA, mask=False, bias=False,
        is_installed=has_flash, package="flash-attn 2.4 or later (pip install flash-attn --no-build-isolation)",
    ),
    "flex": Backend(
        "flex", flex, dtypes=frozenset({*HALF, torch.float32}), max_head_dim=256, device_types=_CUDA, cache=False,
        mask=False, bias=False, dropout=False, for_masks_only=True,
    ),
    "sdpa": Backend("sdpa", sdpa),
    "eager": Backend("eager", eager),
}  # fmt: skip
