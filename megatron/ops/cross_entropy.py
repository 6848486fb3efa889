"""Output head and cross-entropy in one pass over blocks of rows: the full logits never exist.

The gradients of the hidden states and of the head are made in the forward pass, while a block of logits is at hand;
backward only scales them. Works on one rank's rows of a vocabulary that is divided over a process group. It does not
decide which tokens count or how losses are averaged: that is `loss_weight`, given by the caller.
Invariant: at most `chunk_rows` rows of logits are alive at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.ops.matmul import multiply_transposed, uses_onednn

# Measured on a CPU: fewer rows are slower; more are no faster, and their blocks too large for glibc to keep (32 MB at a
# vocabulary of 50,000). A GPU wants larger matrices, and has the memory.
CPU_CHUNK_ROWS = 128
GPU_CHUNK_ROWS = 2048

# Probabilities of a large vocabulary lie in fp16's subnormal range; a power of two lifts them out of it exactly.
FP16_LIFT = 1024.0


@dataclass(frozen=True)
class VocabShard:
    """The rows of the vocabulary that this rank holds.

    group: the ranks that hold the rest, or None where this rank holds all of it.
    start: the global id of the first local row.
    valid: how many local rows are real ids; the rows after them are padding and take no part in the softmax.
    total: how many ids are real over all ranks.
    """

    group: dist.ProcessGroup | None
    start: int
    valid: int
    total: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None, start: int, valid_vocab: int | None) -> VocabShard:
        """Describe `weight` [V_local, H]; `valid_vocab` counts the real ids over all ranks (None: all rows)."""
        size = 1 if group is None else dist.get_world_size(group)
        rows = weight.shape[0]
        total = rows * size if valid_vocab is None else valid_vocab
        return cls(group if size > 1 else None, start, max(0, min(rows, total - start)), total)

    def is_known(self, labels: Tensor) -> Tensor:
        """Which labels are real ids of the whole vocabulary."""
        return (labels >= 0) & (labels < self.total)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    chunk_rows: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of `loss_weight * -log softmax(hidden @ weight.T + bias)[label]`, an fp32 scalar (fp64 for fp64).

    Shapes: hidden [T, H]; weight [V_local, H]; bias [V_local]; labels [T] int64, global ids; loss_weight [T], without
    gradient.
    Parallel: with `group`, each rank holds rows `vocab_start ...` of the head and the same hidden, labels and weights.
    Every rank gets the same loss, the whole gradient of `hidden`, and that of its own rows of `weight` and `bias`.
    A label that is no real id is allowed where its weight is zero; elsewhere the loss becomes NaN, not a wrong number.
    Not differentiable twice; backward may run once.
    """
    shard = VocabShard.of(weight, group, vocab_start, valid_vocab)
    rows = chunk_rows or (GPU_CHUNK_ROWS if hidden.is_cuda else CPU_CHUNK_ROWS)
    known = shard.is_known(labels) | (loss_weight == 0)
    row_weight = loss_weight.detach().to(_compute_dtype(hidden)).masked_fill(~known, float("nan"))
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, row_weight, shard, rows)
        return loss
    losses, _ = _token_losses(hidden, weight, bias, labels, shard, rows)
    return torch.dot(losses, row_weight)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    chunk_rows: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per token: `-log p(label)` in fp32, and whether the label has the largest logit. For evaluation: no gradient.

    Shapes and parallel layout as in `linear_cross_entropy`; both results are [T]. A label that is no real id gives NaN.
    """
    shard = VocabShard.of(weight, group, vocab_start, valid_vocab)
    rows = chunk_rows or (GPU_CHUNK_ROWS if hidden.is_cuda else CPU_CHUNK_ROWS)
    losses, is_best = _token_losses(hidden, weight, bias, labels, shard, rows)
    known = shard.is_known(labels)
    return losses.masked_fill(~known, float("nan")), is_best & known


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_weight: Tensor,
        shard: VocabShard,
        chunk_rows: int,
    ) -> Tensor:
        head = _Head(weight, bias, shard, min(chunk_rows, max(1, hidden.shape[0])))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = hidden.new_empty(hidden.shape, dtype=head.dtype) if wants_hidden else None
        grad_weight = head.new_weight_gradient() if wants_weight else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=head.dtype) if wants_bias else None
        # In half precision the weights of the rows (1 / number of tokens, say) could underflow: relative ones cannot.
        unit = row_weight.abs().amax().clamp_min(1e-30) if head.is_half and row_weight.numel() else None
        loss = hidden.new_zeros((), dtype=head.dtype)
        for start in range(0, hidden.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            block, block_weight = hidden[part], row_weight[part]
            probabilities, losses, _ = head.softmax(block, labels[part])
            loss += torch.dot(losses, block_weight)
            if unit is not None:
                block_weight = block_weight / unit
            head.subtract_target(probabilities, labels[part])
            if grad_bias is not None:
                grad_bias += block_weight @ probabilities
            block_grad = None if grad_hidden is None else grad_hidden[part]
            head.backward(probabilities, block, block_weight, block_grad, grad_weight)
            # Or the next block of logits would be made while this one lives.
            del probabilities
        if grad_hidden is not None and shard.group is not None:
            dist.all_reduce(grad_hidden, group=shard.group)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.unit = unit
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward ran twice; its gradients were handed out the first time")
        gradients, unit = ctx.gradients, ctx.unit
        # Our references go, so that autograd takes the buffers as .grad instead of copying them.
        ctx.gradients = None
        scale = grad_output if unit is None else grad_output * unit
        is_one = scale.device.type == "cpu" and scale.item() == 1.0
        results: list[Tensor | None] = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is not None and not is_one:
                gradient.mul_(scale)
            results.append(None if gradient is None else gradient.to(dtype).contiguous())
        return *results, None, None, None, None


class _Head:
    """The head's matrix and the buffers of one call: turns a block of hidden rows into probabilities, and back."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shard: VocabShard, rows: int) -> None:
        self.shard = shard
        self.bias = None if bias is None else bias.to(_compute_dtype(weight))
        self.dtype = _compute_dtype(weight)
        # A GPU multiplies half matrices with an fp32 result; a CPU is exact, and no slower, on an fp32 copy.
        self.is_half = weight.dtype != self.dtype and _multiplies_half(weight.device)
        self.weight = weight if self.is_half else weight.to(self.dtype)
        self.lift = FP16_LIFT if self.is_half and weight.dtype == torch.float16 else 1.0
        self.by_onednn = uses_onednn(self.weight)
        # oneDNN gives a new matrix each time; the allocator then hands out the last block's memory again.
        self.logits = None if self.by_onednn else weight.new_empty((rows, weight.shape[0]), dtype=self.dtype)
        self.half = weight.new_empty((rows, weight.shape[0])) if self.is_half else None

    def new_weight_gradient(self) -> Tensor:
        """Zeros [V_local, H]; transposed in memory where the products come out transposed fastest."""
        rows, columns = self.weight.shape
        if self.by_onednn:
            return self.weight.new_zeros((columns, rows)).t()
        return self.weight.new_zeros((rows, columns), dtype=self.dtype)

    def softmax(self, block: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of this rank's ids, the loss of each row, whether the label is the best.

        The log of the sum comes from the largest probability, which is its exact reciprocal and never underflows.
        """
        shard, block = self.shard, block.to(self.weight.dtype)
        if self.logits is None:
            logits = multiply_transposed(block, self.weight)
        else:
            logits = self.logits[: block.shape[0]]
            _multiply(block, self.weight.t(), logits)
        if self.bias is not None:
            logits += self.bias
        if shard.valid < logits.shape[1]:
            logits[:, shard.valid :] = float("-inf")
        index, is_local = self._local(labels)
        target = logits.gather(1, index).squeeze(1)
        if shard.valid:
            best = logits.amax(1)
            torch.softmax(logits, 1, out=logits)
            log_sum = best - logits.amax(1).log()
        else:
            best = log_sum = torch.full_like(target, float("-inf"))
            logits.zero_()
        if shard.group is None:
            return logits, log_sum - target, target >= best
        own = torch.stack([best, log_sum, torch.where(is_local, target, float("-inf"))])
        every = own.new_empty((dist.get_world_size(shard.group), *own.shape))
        dist.all_gather_into_tensor(every.view(-1, own.shape[1]), own, group=shard.group)
        best, total, target = every[:, 0].amax(0), every[:, 1].logsumexp(0), every[:, 2].amax(0)
        logits.mul_((log_sum - total).exp().unsqueeze(1))
        # A label that no rank holds has weight zero: any finite number will do.
        return logits, total - torch.where(torch.isneginf(target), total, target), target >= best

    def subtract_target(self, probabilities: Tensor, labels: Tensor) -> None:
        """Turn probabilities into the gradient by the logits: one less at the label."""
        index, is_local = self._local(labels)
        probabilities.scatter_add_(1, index, -is_local.to(probabilities.dtype).unsqueeze(1))

    def backward(
        self,
        by_logits: Tensor,
        block: Tensor,
        row_weight: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Write the gradient of the block into `grad_hidden` and add that of the matrix to `grad_weight`."""
        if self.half is not None:
            by_logits = torch.mul(by_logits, self.lift, out=self.half[: by_logits.shape[0]])
        row_weight = row_weight.unsqueeze(1)
        if grad_hidden is not None:
            if self.by_onednn:
                grad_hidden.copy_(multiply_transposed(by_logits, self.weight.t()))
            else:
                _multiply(by_logits, self.weight, grad_hidden)
            grad_hidden.mul_(row_weight / self.lift)
        if grad_weight is not None:
            weighted = (block * row_weight).to(by_logits.dtype)
            if self.by_onednn:
                grad_weight.t().add_(multiply_transposed(weighted.t(), by_logits.t()))
            else:
                _accumulate(by_logits.t(), weighted, grad_weight, 1 / self.lift)

    def _local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        index = labels - self.shard.start
        is_local = (index >= 0) & (index < self.shard.valid)
        # A label that is not here points at some real id: its finite number is then multiplied by a weight of zero.
        return index.clamp(0, max(self.shard.valid, 1) - 1).unsqueeze(1), is_local


def _token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shard: VocabShard, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    head = _Head(weight, bias, shard, min(chunk_rows, max(1, hidden.shape[0])))
    losses = hidden.new_empty(hidden.shape[0], dtype=head.dtype)
    is_best = torch.empty_like(losses, dtype=torch.bool)
    for start in range(0, hidden.shape[0], chunk_rows):
        part = slice(start, start + chunk_rows)
        _, losses[part], is_best[part] = head.softmax(hidden[part], labels[part])
    return losses, is_best


def _multiplies_half(device: torch.device) -> bool:
    return device.type == "cuda"


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`; an fp32 `out` of half factors is not rounded in between."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _accumulate(a: Tensor, b: Tensor, out: Tensor, alpha: float) -> None:
    """`out += alpha * a @ b`, likewise."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif _adds_in_place(a.device, a.dtype):
        torch.addmm(out, a, b, alpha=alpha, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=alpha)


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of halves to an fp32 matrix in one kernel (it came in several versions)."""
    factor = torch.ones((16, 16), device=device, dtype=dtype)
    total = torch.ones((16, 16), device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
