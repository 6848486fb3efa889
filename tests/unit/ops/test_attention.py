"""Every attention backend against an oracle written with loops, over shapes, masks and dtypes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megatron.common.errors import ConfigError
from megatron.ops import attention as module
from megatron.ops import attention_backends as backends
from megatron.ops.attention import BACKENDS as EVERY_BACKEND
from megatron.ops.attention import Attention, Backend, Request, attention, select
from megatron.ops.attention_backends import eager
from megatron.ops.position_bias import alibi_slopes

# Those that a machine without CUDA runs; tests/gpu compares all.
BACKENDS = {name: backend for name, backend in EVERY_BACKEND.items() if backend.device_types is None}

# fp32: sums of at most a few hundred products. Half: inputs exact, weights and result rounded to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def tensors(B: int, N: int, G: int, T: int, S: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, laid out as a fused projection leaves them: [B, T, heads, D] transposed."""
    g = torch.Generator().manual_seed(B + N + 10 * T + S + D)
    q = torch.randn(B, T, N, D, generator=g).to(dtype).transpose(1, 2)
    k = torch.randn(B, S, G, D, generator=g).to(dtype).transpose(1, 2)
    v = torch.randn(B, S, G, D, generator=g).to(dtype).transpose(1, 2)
    return q, k, v


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    lengths: list[int] | None,
    bias: Tensor | None = None,
    slopes: list[float] | None = None,
) -> Tensor:
    """Row by row in float64, straight from the definition."""
    B, N, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(B, N, T, D, dtype=torch.float64)
    for b, n, i in itertools.product(range(B), range(N), range(T)):
        length = S if lengths is None else lengths[b]
        at = length - T + i
        seen = [
            j
            for j in range(length)
            if (not causal or j <= at)
            and (window is None or j >= at - window)
            and (mask is None or bool(mask.expand(B, 1, T, S)[b, 0, i, j]))
        ]
        if seen:
            keys, values = k[b, n * G // N, seen], v[b, n * G // N, seen]
            scores = keys @ q[b, n, i] / math.sqrt(D)
            if bias is not None:
                scores = scores + bias.expand(B, N, T, S)[b, n, i, seen].double()
            if slopes is not None:
                scores = scores + slopes[n] * torch.tensor([float(j - at) for j in seen])
            out[b, n, i] = scores.softmax(0) @ values
    return out


SHAPES = [
    (2, 4, 4, 7, 7, 8),
    (2, 6, 2, 5, 5, 16),
    (1, 4, 1, 1, 9, 8),
    (2, 6, 3, 1, 6, 8),
    (2, 4, 2, 3, 8, 24),
    (1, 1, 1, 1, 1, 4),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 0, 2, 100])
@pytest.mark.parametrize("limit", ["none", "lengths", "mask", "empty rows"])
def test_backends_equal_the_definition(
    backend: str, shape: tuple[int, ...], causal: bool, window: int | None, limit: str
) -> None:
    B, _, _, T, S, _ = shape
    q, k, v = tensors(*shape, torch.float32)
    lengths = [max(T, S - 2 * b - 1) for b in range(B)] if limit == "lengths" else None
    mask = None
    if limit in ("mask", "empty rows"):
        mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[..., 0] |= limit == "mask"
        if limit == "empty rows":
            mask[0, 0, 0] = False
    out = attention(
        q, k, v, causal=causal, window=window, mask=mask, backend=backend,
        key_lengths=None if lengths is None else torch.tensor(lengths),
    )  # fmt: skip
    expected = oracle(q, k, v, causal, window, mask, lengths)
    assert out.shape == q.shape
    assert float((out - expected).abs().max()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_backends_in_every_dtype(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = tensors(*shape, dtype)
    out = attention(q, k, v, backend=backend)
    assert out.dtype == dtype
    assert float((out.double() - oracle(q, k, v, True, None, None, None)).abs().max()) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_equal_those_of_the_definition(backend: str, shape: tuple[int, ...], window: int | None) -> None:
    inputs = [x.clone().requires_grad_() for x in tensors(*shape, torch.float64)]
    exact = [x.detach().clone().requires_grad_() for x in inputs]
    weights = torch.randn(shape[0], shape[1], shape[3], shape[5], dtype=torch.float64)
    (attention(*inputs, window=window, backend=backend) * weights).sum().backward()
    (oracle(*exact, True, window, None, None) * weights).sum().backward()
    for got, expected in zip(inputs, exact, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        assert torch.allclose(got.grad, expected.grad, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_used(backend: str) -> None:
    q, k, v = tensors(1, 2, 2, 4, 4, 16, torch.float32)
    scaled = attention(q, k, v, scale=0.5, backend=backend)
    assert torch.allclose(scaled, attention(q * 2, k, v, backend=backend), atol=2e-6)
    assert not torch.allclose(scaled, attention(q, k, v, backend=backend), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_token_by_token_equals_the_whole_sequence(backend: str) -> None:
    q, k, v = tensors(2, 6, 2, 9, 9, 8, torch.float32)
    whole = attention(q, k, v, backend=backend)
    for i in range(9):
        one = attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], backend=backend)
        assert torch.allclose(one, whole[:, :, i : i + 1], atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean_and_follows_the_generator(backend: str) -> None:
    q, k, v = tensors(64, 4, 4, 16, 16, 4, torch.float32)
    v = torch.ones_like(v)
    torch.manual_seed(3)
    first = attention(q, k, v, dropout_p=0.25, backend=backend)
    torch.manual_seed(3)
    again = attention(q, k, v, dropout_p=0.25, backend=backend)
    assert torch.equal(first, again)
    assert abs(float(first.mean()) - 1.0) < 0.02  # 4096 rows of spread below 0.6
    assert float(first.std()) > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", ["none", "mask", "window"])
@pytest.mark.parametrize("kind", ["bias", "slopes", "both"])
def test_what_is_added_to_scores(backend: str, shape: tuple[int, ...], limit: str, kind: str) -> None:
    B, N, _, T, S, _ = shape
    q, k, v = tensors(*shape, torch.float32)
    g = torch.Generator().manual_seed(5)
    bias = torch.randn(1, N, T, S, generator=g) if kind != "slopes" else None
    slopes = [0.5 / (n + 1) for n in range(N)] if kind != "bias" else None
    mask = torch.rand(B, 1, T, S, generator=g) < 0.8 if limit == "mask" else None
    window = 2 if limit == "window" else None
    got = attention(
        q, k, v, window=window, mask=mask, bias=bias, backend=backend,
        slopes=None if slopes is None else torch.tensor(slopes),
    )  # fmt: skip
    expected = oracle(q, k, v, True, window, mask, None, bias, slopes)
    assert (got.double() - expected).abs().max() < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_bias(backend: str) -> None:
    q, k, v = tensors(2, 4, 2, 5, 5, 8, torch.float64)
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, theirs = bias.clone().requires_grad_(), bias.clone().requires_grad_()
    attention(q, k, v, bias=mine, backend=backend).square().sum().backward()
    attention(q, k, v, bias=theirs, backend="eager").square().sum().backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=0)


class _FlashAttn:
    """The package's function by its documentation: [B, T, N, D], window (left, right) with -1 for no limit."""

    @staticmethod
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool,
        window_size: tuple[int, int], alibi_slopes: Tensor | None,
    ) -> Tensor:  # fmt: skip
        assert dropout_p == 0
        left, right = window_size
        assert right in (-1, 0)
        slopes = None if alibi_slopes is None else alibi_slopes.tolist()
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = oracle(q, k, v, causal, None if left < 0 else left, None, None, None, slopes)
        return out.to(q.dtype).transpose(1, 2)


@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("shape", [(2, 4, 4, 7, 7, 8), (2, 6, 2, 5, 5, 16), (1, 4, 1, 3, 9, 8)], ids=str)
@pytest.mark.parametrize(("window", "alibi"), [(None, False), (2, False), (None, True), (3, True), (100, True)])
def test_kernels_for_masks_ask_for_what_is_meant(
    backend: str, shape: tuple[int, ...], window: int | None, alibi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels need CUDA (tests/gpu); what is asked of them is the same here, over plain implementations."""
    monkeypatch.setattr(backends, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(backends, "_flash_attn", lambda: _FlashAttn)
    q, k, v = tensors(*shape, torch.float32)
    slopes = alibi_slopes(shape[1]) if alibi else None
    got = attention(q, k, v, window=window, slopes=slopes, backend=backend)
    expected = oracle(q, k, v, True, window, None, None, None, None if slopes is None else slopes.tolist())
    assert (got.double() - expected).abs().max() < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("changes", "has_flash", "chosen"),
    [
        ({}, False, "sdpa"),
        ({}, True, "flash"),
        ({"window": True}, False, "flex"),
        ({"alibi": True}, False, "flex"),
        ({"window": True}, True, "flash"),
        ({"window": True, "cache": True}, False, "sdpa"),
        ({"alibi": True, "dropout": True}, False, "sdpa"),
        ({"mask": True}, True, "sdpa"),
        ({"bias": True}, True, "sdpa"),
        ({"dtype": torch.float32}, True, "sdpa"),
        ({"window": True, "head_dim": 512}, True, "sdpa"),
    ],
)
def test_what_is_chosen_on_a_gpu(
    changes: dict[str, object], has_flash: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash = dataclasses.replace(EVERY_BACKEND["flash"], is_installed=lambda: has_flash)
    monkeypatch.setitem(EVERY_BACKEND, "flash", flash)
    request = dataclasses.replace(Request("cuda", torch.bfloat16, 64, 8, 2), **changes)  # type: ignore[arg-type]
    assert select(request).name == chosen


def test_attention_object_drops_only_in_training_and_masks_replace_causality() -> None:
    q, k, v = tensors(2, 4, 2, 6, 6, 8, torch.float32)
    layer = Attention(dropout=0.5)
    assert torch.equal(layer(q, k, v), attention(q, k, v))
    assert not torch.allclose(layer(q, k, v, training=True), attention(q, k, v), atol=1e-3)
    mask = torch.rand(2, 1, 6, 6) < 0.7
    assert torch.equal(layer(q, k, v, mask=mask), attention(q, k, v, causal=False, mask=mask))


REQUEST = Request("cpu", torch.float32, 64, 8, 2, cache=True, window=True)


def test_auto_says_once_what_it_took_and_what_it_passed_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Backend("narrow", eager, max_head_dim=32)
    monkeypatch.setattr(module, "BACKENDS", {"narrow": narrow, **BACKENDS})
    monkeypatch.setattr(module, "_logged", set())
    with caplog.at_level(logging.INFO, logger="megatron.ops.attention"):
        assert select(REQUEST).name == "sdpa"
        assert select(REQUEST).name == "sdpa"
    assert [record.message for record in caplog.records] == [
        "attention: sdpa for torch.float32 on cpu (not narrow: its largest head dimension is 32, here it is 64)"
    ]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"dtypes": module.HALF}, "does not take torch.float32"),
        (
            {"is_installed": lambda: False, "package": "fast (pip install it)"},
            r"fast \(pip install it\) is not installed",
        ),
        ({"device_types": frozenset({"cuda"})}, "does not run on cpu"),
        ({"gqa": False}, "does not share keys"),
        ({"cache": False}, "has no cache"),
        ({"window": False}, "has no window"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_an_error(
    limits: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKENDS", {"poor": Backend("poor", eager, **limits)})  # type: ignore[arg-type]
    for asked in ("poor", "auto"):
        with pytest.raises(ConfigError, match=reason):
            select(REQUEST, asked)


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'flash9' is not known\. Use one of: auto, flash, flex, sdpa, eager"):
        select(REQUEST, "flash9")
