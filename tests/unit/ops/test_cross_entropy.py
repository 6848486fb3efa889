"""The chunked loss against float64 softmax over the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.ops import cross_entropy, matmul
from megatron.ops.cross_entropy import linear_cross_entropy, token_losses

# Relative to the largest entry. fp32: a few roundings per product of length H. Half: the gradient is rounded once.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def problem(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random hidden, weight, labels and loss weights; a fifth of the tokens is ignored with label -100."""
    g = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(tokens, hidden, generator=g)).to(dtype)
    w = torch.randn(vocab, hidden, generator=g).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    weights = torch.rand(tokens, generator=g) + 0.1
    ignored = torch.rand(tokens, generator=g) < 0.2
    return x, w, labels.masked_fill(ignored, -100), weights.masked_fill(ignored, 0.0)


def oracle(
    x: Tensor, w: Tensor, labels: Tensor, weights: Tensor, valid: int | None = None, upstream: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64 from full logits."""
    x, w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    losses = F.cross_entropy((x @ w.t())[:, :valid], labels, reduction="none", ignore_index=-100)
    loss = (losses * weights.double()).sum()
    (loss * upstream).backward()
    assert x.grad is not None
    assert w.grad is not None
    return loss.detach(), x.grad, w.grad


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest expected entry."""
    limit = tolerance * max(float(expected.abs().max()), 1e-30)
    worst = float((got.double() - expected).abs().max())
    assert worst <= limit, f"off by {worst:.3e}, allowed {limit:.3e}"


@pytest.mark.parametrize("library", ["default", "oneDNN"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "rows", "valid"),
    [(1, 3, 7, 4, None), (37, 16, 101, 8, None), (32, 16, 101, 8, 97), (5, 8, 33, 512, 1), (65, 5, 64, 1, 50)],
)
def test_loss_and_gradients_equal_the_oracle(
    tokens: int,
    hidden: int,
    vocab: int,
    rows: int,
    valid: int | None,
    dtype: torch.dtype,
    library: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if library == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: library == "oneDNN")
    x, w, labels, weights = problem(tokens, hidden, vocab, dtype)
    labels = torch.where(labels >= 0, labels % (valid or vocab), labels)
    expected, by_x, by_w = oracle(x, w, labels, weights, valid, upstream=0.25)
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, labels, weights, valid_vocab=valid, chunk_rows=rows)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    (loss * 0.25).backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype == w.grad.dtype == dtype
    assert w.grad.is_contiguous()
    # The loss is never rounded to half: its tolerance is that of fp32.
    assert_close(loss.detach(), expected, min(TOLERANCE[dtype], 3e-6))
    assert_close(x.grad, by_x, TOLERANCE[dtype])
    assert_close(w.grad, by_w, TOLERANCE[dtype])


@pytest.mark.parametrize(("tokens", "vocab", "rows", "valid"), [(37, 101, 8, 97), (5, 33, 512, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_on_the_logits(tokens: int, vocab: int, rows: int, valid: int | None, dtype: torch.dtype) -> None:
    x, w, labels, weights = problem(tokens, 16, valid or vocab, dtype)
    w = torch.cat([w, torch.randn(vocab - len(w), 16).to(dtype)])
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    logits = F.linear(exact[0], exact[1], exact[2])[:, :valid]
    expected = (F.cross_entropy(logits, labels, reduction="none", ignore_index=-100) * weights.double()).sum()
    expected.backward()
    mine = [t.detach().requires_grad_() for t in (x, w, bias)]
    loss = linear_cross_entropy(mine[0], mine[1], labels, weights, bias=mine[2], valid_vocab=valid, chunk_rows=rows)
    (3 * loss).backward()
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    assert_close(loss.detach(), expected.detach(), tolerance)
    for got, wanted in zip(mine, exact, strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        assert_close(got.grad, 3 * wanted.grad, tolerance)
    token, best = token_losses(x, w, labels.clamp_min(0), bias=bias, valid_vocab=valid, chunk_rows=rows)
    every = F.cross_entropy(logits.detach(), labels.clamp_min(0), reduction="none")
    assert_close(token, every, tolerance)
    assert torch.equal(best, logits.argmax(1) == labels.clamp_min(0))


def test_large_logits_stay_finite_and_exact() -> None:
    x, w, labels, weights = problem(19, 16, 53, scale=100.0)
    expected, by_x, by_w = oracle(x, w, labels, weights)
    assert expected > 1000, "the case is meant to underflow every other probability"
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, labels, weights, chunk_rows=4)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert_close(loss.detach(), expected, 1e-6)
    assert_close(x.grad, by_x, 1e-4)  # logits of 1000 carry an error of 1e-4 in fp32
    assert_close(w.grad, by_w, 1e-4)


def test_all_weights_zero_give_zero_and_no_gradient() -> None:
    x, w, labels, _ = problem(9, 4, 11)
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, labels, torch.zeros(9))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert w.grad is not None
    assert not w.grad.any()


def test_no_tokens_give_zero() -> None:
    w = torch.randn(11, 4, requires_grad=True)
    loss = linear_cross_entropy(torch.empty(0, 4), w, torch.empty(0, dtype=torch.long), torch.empty(0))
    loss.backward()
    assert loss.item() == 0.0
    assert w.grad is not None
    assert not w.grad.any()


@pytest.mark.parametrize("label", [-100, -1, 9, 10, 500])
def test_a_counted_label_that_is_no_id_makes_the_loss_nan(label: int) -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4)
    labels = torch.tensor([1, label, 2])
    assert linear_cross_entropy(x, w, labels, torch.ones(3), valid_vocab=9).isnan()
    ignored = linear_cross_entropy(x, w, labels, torch.tensor([1.0, 0.0, 1.0]), valid_vocab=9)
    assert ignored.isfinite()
    losses, is_best = token_losses(x, w, labels, valid_vocab=9)
    assert losses.isnan().tolist() == [False, True, False]
    assert not is_best[1]


def test_padding_rows_change_nothing_and_get_no_gradient() -> None:
    x, w, labels, weights = problem(21, 8, 40)
    padded = torch.cat([w, 100 * torch.randn(24, 8)]).requires_grad_()
    loss = linear_cross_entropy(x, padded, labels, weights, valid_vocab=40, chunk_rows=8)
    loss.backward()
    expected, _, by_w = oracle(x, w, labels, weights)
    assert padded.grad is not None
    assert_close(loss.detach(), expected, 3e-6)
    assert_close(padded.grad[:40], by_w, 3e-6)
    assert not padded.grad[40:].any()


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_wanted_gradient_is_made(wanted: str) -> None:
    x, w, labels, weights = problem(13, 8, 40)
    _, by_x, by_w = oracle(x, w, labels, weights)
    (x if wanted == "hidden" else w).requires_grad_()
    linear_cross_entropy(x, w, labels, weights).backward()
    gradient, other, expected = (x.grad, w.grad, by_x) if wanted == "hidden" else (w.grad, x.grad, by_w)
    assert other is None
    assert gradient is not None
    assert_close(gradient, expected, 3e-6)


def test_weight_gradients_of_two_backward_passes_add_up() -> None:
    x, w, labels, weights = problem(13, 8, 40)
    _, _, by_w = oracle(x, w, labels, weights)
    w.requires_grad_()
    for _ in range(2):
        linear_cross_entropy(x, w, labels, weights).backward()
    assert w.grad is not None
    assert_close(w.grad, 2 * by_w, 3e-6)


def test_second_backward_of_one_forward_is_refused() -> None:
    x, w, labels, weights = problem(5, 4, 10)
    loss = linear_cross_entropy(x.requires_grad_(), w, labels, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()


class Sizes(TorchDispatchMode):
    """Records the size of every tensor that comes out of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_tensor_is_larger_than_a_block_of_logits_or_the_matrix(with_gradient: bool) -> None:
    x, w, labels, weights = problem(200, 4, 300)
    x.requires_grad_(with_gradient), w.requires_grad_(with_gradient)
    with Sizes() as sizes:
        loss = linear_cross_entropy(x, w, labels, weights, chunk_rows=7)
        if with_gradient:
            loss.backward()
        token_losses(x, w, labels, chunk_rows=7)
    assert 0 < sizes.largest <= 7 * 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradient_the_loss_is_the_same(dtype: torch.dtype) -> None:
    x, w, labels, weights = problem(37, 16, 101, dtype)
    with_graph = linear_cross_entropy(x.clone().requires_grad_(), w, labels, weights, chunk_rows=8)
    without = linear_cross_entropy(x, w, labels, weights, chunk_rows=8)
    assert not without.requires_grad
    assert_close(without, with_graph.detach().double(), 1e-6)


def test_token_losses_equal_log_softmax_and_argmax() -> None:
    x, w, labels, _ = problem(50, 16, 23)
    labels = labels.clamp_min(0)
    logits = x.double() @ w.double().t()
    labels[::3] = logits.argmax(1)[::3]
    losses, is_best = token_losses(x, w, labels, chunk_rows=7)
    assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), 3e-6)
    assert torch.equal(is_best, logits.argmax(1) == labels)
    assert is_best.any()
    assert not is_best.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_matmul_path_keeps_tiny_row_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's path, with its two mixed-precision products emulated: weights of 1e-9 must survive fp16."""

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert a.dtype == b.dtype == dtype
        out.copy_(a.float() @ b.float())

    def accumulate(a: Tensor, b: Tensor, out: Tensor, alpha: float) -> None:
        assert a.dtype == b.dtype == dtype
        out.add_(a.float() @ b.float(), alpha=alpha)

    monkeypatch.setattr(cross_entropy, "_multiplies_half", lambda device: True)
    monkeypatch.setattr(cross_entropy, "_multiply", multiply)
    monkeypatch.setattr(cross_entropy, "_accumulate", accumulate)
    x, w, labels, weights = problem(37, 16, 101, dtype)
    weights = weights * 1e-9
    expected, by_x, by_w = oracle(x, w, labels, weights, 101, upstream=2.0**28)
    x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, labels, weights, chunk_rows=8)
    (loss * 2.0**28).backward()
    assert x.grad is not None
    assert w.grad is not None
    assert_close(loss.detach(), expected, 3e-6)
    # Probabilities are rounded to half before the product: a little more than one rounding of the result.
    assert_close(x.grad, by_x, 2 * TOLERANCE[dtype])
    assert_close(w.grad, by_w, 2 * TOLERANCE[dtype])


def _on_vocabulary_shards(vocab: int, valid: int, scale: float, rows: int) -> tuple[Tensor, ...]:
    size, rank = dist.get_world_size(), dist.get_rank()
    x, w, labels, weights = problem(23, 8, vocab, scale=scale)
    labels = torch.where(labels >= 0, labels % valid, labels)
    width = vocab // size
    shard = w[rank * width : (rank + 1) * width].clone().requires_grad_()
    x.requires_grad_()
    place = {"group": dist.group.WORLD, "vocab_start": rank * width, "valid_vocab": valid, "chunk_rows": rows}
    loss = linear_cross_entropy(x, shard, labels, weights, **place)
    (loss * 0.5).backward()
    losses, is_best = token_losses(x, shard, labels.clamp_min(0), **place)
    assert x.grad is not None
    assert shard.grad is not None
    return loss.detach(), x.grad, shard.grad, losses, is_best


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("vocab", "valid", "scale"),
    [(42, 42, 1.0), (42, 37, 1.0), (42, 13, 1.0), (42, 41, 100.0)],
    ids=["all ids real", "padding on the last", "ranks without real ids", "large logits"],
)
def test_divided_vocabulary_equals_the_oracle(
    ranks: Any, world_size: int, vocab: int, valid: int, scale: float
) -> None:
    x, w, labels, weights = problem(23, 8, vocab, scale=scale)
    labels = torch.where(labels >= 0, labels % valid, labels)
    expected, by_x, by_w = oracle(x, w, labels, weights, valid, upstream=0.5)
    results = ranks(_on_vocabulary_shards, world_size, vocab, valid, scale, 5)
    tolerance = 3e-6 if scale == 1.0 else 1e-4
    logits = (x.double() @ w.double().t())[:, :valid]
    for loss, x_grad, _, losses, is_best in results:
        assert torch.equal(loss, results[0][0]), "ranks must agree to the bit"
        assert_close(loss, expected, tolerance)
        assert_close(x_grad, by_x, tolerance)
        assert_close(losses, F.cross_entropy(logits, labels.clamp_min(0), reduction="none"), tolerance)
        assert torch.equal(is_best, logits.argmax(1) == labels.clamp_min(0))
    assert_close(torch.cat([result[2] for result in results]), by_w, tolerance)
