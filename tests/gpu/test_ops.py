"""Kernels on a GPU against the same oracles in float64 on the CPU: `python -m pytest tests/gpu`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.attention import BACKENDS, attention
from megatron.ops.cross_entropy import linear_cross_entropy, token_losses
from megatron.ops.norms import layer_norm, rms_norm
from megatron.ops.position_bias import alibi_slopes
from megatron.ops.rotary import RotaryTable, apply_rotary
from megatron.optim.build import build_optimizer

CUDA = torch.device("cuda")
# Relative to the largest entry: fp32 sums in any order (no TF32 is switched on), half rounded a few times.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest expected entry."""
    worst = float((got.detach().cpu().double() - expected.detach()).abs().max())
    limit = tolerance * float(expected.detach().abs().max())
    assert worst <= limit, f"off by {worst:.3e}, allowed {limit:.3e}"


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Seeded normal numbers that `dtype` holds exactly, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "valid", "rows"),
    [(1, 8, 16, None, 4), (300, 64, 1000, 993, 64), (513, 128, 50304, 50277, 256)],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_cross_entropy(
    tokens: int, hidden: int, vocab: int, valid: int | None, rows: int, scale: float, dtype: torch.dtype
) -> None:
    x, w = random(tokens, hidden, dtype=dtype), random(vocab, hidden, dtype=dtype, seed=1) * 0.1
    labels = torch.randint(0, valid or vocab, (tokens,), generator=torch.Generator().manual_seed(2))
    # Like a mean over tokens under fp16 loss scaling: each weight is tiny, and the scale comes in the backward pass.
    weights = torch.full((tokens,), 1.0 / tokens)
    exact_x, exact_w = x.double().requires_grad_(), w.double().requires_grad_()
    losses = F.cross_entropy((exact_x @ exact_w.t())[:, :valid], labels, reduction="none")
    ((losses * weights).sum() * scale).backward()
    x, w = x.to(CUDA).requires_grad_(), w.to(CUDA).requires_grad_()
    loss = linear_cross_entropy(x, w, labels.to(CUDA), weights.to(CUDA), valid_vocab=valid, chunk_rows=rows)
    (loss * scale).backward()
    assert exact_x.grad is not None
    assert exact_w.grad is not None
    assert x.grad is not None
    assert w.grad is not None
    assert_close(loss, (losses * weights).sum(), 1e-5)
    assert_close(x.grad, exact_x.grad, TOLERANCE[dtype])
    assert_close(w.grad, exact_w.grad, TOLERANCE[dtype])
    per_token, _ = token_losses(x, w, labels.to(CUDA), valid_vocab=valid, chunk_rows=rows)
    assert_close(per_token, losses, 1e-5)


def test_cross_entropy_needs_no_full_logits() -> None:
    tokens, hidden, vocab = 8192, 512, 50304
    x = torch.randn(tokens, hidden, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(vocab, hidden, device=CUDA, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=CUDA)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, w, labels, torch.ones(tokens, device=CUDA), chunk_rows=512).backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < tokens * vocab * 4 / 3, f"{used / 1e6:.0f} MB"


GENERAL = ["sdpa", "eager"]


@DTYPES
@pytest.mark.parametrize("backend", GENERAL)
@pytest.mark.parametrize(
    ("N", "G", "T", "S", "D"), [(4, 4, 128, 128, 64), (8, 2, 65, 65, 96), (8, 2, 1, 77, 64), (6, 3, 5, 33, 32)]
)
@pytest.mark.parametrize("window", [None, 9])
def test_attention(
    N: int, G: int, T: int, S: int, D: int, window: int | None, backend: str, dtype: torch.dtype
) -> None:
    inputs = [random(2, heads, n, D, dtype=dtype, seed=i) for i, (heads, n) in enumerate([(N, T), (G, S), (G, S)])]
    exact = [x.double().requires_grad_() for x in inputs]
    expected = attention(*exact, window=window, backend="eager")
    expected.sum().backward()
    inputs = [x.to(CUDA).requires_grad_() for x in inputs]
    got = attention(*inputs, window=window, backend=backend)
    got.sum().backward()
    assert_close(got, expected, TOLERANCE[dtype])
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        # Gradients of queries and keys are small differences of large terms.
        assert float((x.grad.cpu().double() - y.grad).abs().max()) <= 8 * TOLERANCE[dtype] * max(
            1.0, float(y.grad.abs().max())
        )


@DTYPES
@pytest.mark.parametrize("backend", [name for name in ("flex", "flash") if BACKENDS[name].is_installed()])
@pytest.mark.parametrize(("N", "G", "T", "D"), [(4, 4, 128, 64), (8, 2, 200, 128), (6, 1, 77, 32)])
@pytest.mark.parametrize(("window", "alibi"), [(9, False), (None, True), (40, True)])
def test_kernels_for_masks(
    N: int, G: int, T: int, D: int, window: int | None, alibi: bool, backend: str, dtype: torch.dtype
) -> None:
    if dtype not in BACKENDS[backend].dtypes:
        dtype = torch.bfloat16
    inputs = [random(2, heads, T, D, dtype=dtype, seed=i) for i, heads in enumerate((N, G, G))]
    slopes = alibi_slopes(N) if alibi else None
    exact = [x.double().requires_grad_() for x in inputs]
    expected = attention(*exact, window=window, slopes=slopes, backend="eager")
    expected.sum().backward()
    inputs = [x.to(CUDA).requires_grad_() for x in inputs]
    got = attention(*inputs, window=window, slopes=slopes, backend=backend)
    got.sum().backward()
    assert_close(got, expected, TOLERANCE[dtype])
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert float((x.grad.cpu().double() - y.grad).abs().max()) <= 8 * TOLERANCE[dtype] * max(
            1.0, float(y.grad.abs().max())
        )


@pytest.mark.parametrize("backend", GENERAL)
def test_attention_with_key_lengths_and_rows_that_see_nothing(backend: str) -> None:
    q, k, v = (random(2, 4, n, 64, dtype=torch.float32, seed=i) for i, n in enumerate((1, 40, 40)))
    lengths = torch.tensor([7, 40])
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1] = False
    for keywords in ({"key_lengths": lengths}, {"mask": mask}):
        expected = attention(q.double(), k.double(), v.double(), backend="eager", **keywords)  # type: ignore[arg-type]
        on_gpu = {name: tensor.to(CUDA) for name, tensor in keywords.items()}
        got = attention(q.to(CUDA), k.to(CUDA), v.to(CUDA), backend=backend, **on_gpu)  # type: ignore[arg-type]
        assert_close(got, expected, 2e-5)


@DTYPES
def test_norms_and_rotary(dtype: torch.dtype) -> None:
    x = random(2, 3, 11, 64, dtype=dtype)
    weight, bias = random(64, dtype=dtype, seed=1), random(64, dtype=dtype, seed=2)
    parameters = [t.to(CUDA) for t in (weight, bias)]
    exact = layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    assert_close(layer_norm(x.to(CUDA), *parameters, 1e-5), exact, TOLERANCE[dtype])
    exact = rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(rms_norm(x.to(CUDA), parameters[0], 1e-5), exact, TOLERANCE[dtype])
    table = RotaryTable(16)
    cos, sin = table.at(11, None, torch.device("cpu"))
    exact, _ = apply_rotary(x.double(), x.double(), cos.double(), sin.double())
    got, _ = apply_rotary(x.to(CUDA), x.to(CUDA), *table.at(11, None, CUDA))
    assert got.dtype == dtype
    assert_close(got, exact, TOLERANCE[dtype])


def test_adam_is_fused_and_equals_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        parameter = torch.nn.Parameter(random(1000, dtype=torch.float32).to(device))
        optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.1}], "Adam", lr=0.01)
        assert optimizer.defaults["fused"] is True
        for seed in range(5):
            parameter.grad = random(1000, dtype=torch.float32, seed=seed).to(device)
            optimizer.step()
        results.append(parameter.detach().cpu().double())
    assert_close(results[1], results[0], 1e-6)
