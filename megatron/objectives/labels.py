"""Losses of models that predict labels: one for each token that has one, or the start and the end of an answer.

Invariant: as in `language_model`; a token whose mask is 0, and a sequence without an answer, count for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron.objectives.language_model import LossTerm
from megatron.ops.cross_entropy import linear_cross_entropy
from megatron.ops.matmul import linear

# What the labels of a question's text say: bits.
START, END = 1, 2


def label_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, bias: torch.Tensor | None
) -> LossTerm:
    """Sum of -log p(label) over the tokens whose mask is 1.

    Shapes: hidden [B, S, H], weight [num_labels, H], bias [num_labels], labels int64 [B, S], loss_mask float [B, S].
    Parallel: everything is replicated over the tensor-parallel ranks, and so is the result.
    """
    mask = loss_mask.reshape(-1).float()
    total = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), mask, bias=bias)
    return LossTerm(total, mask.sum())


def span_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, bias: torch.Tensor | None
) -> LossTerm:
    """Sum over sequences of the mean of -log p(start) and -log p(end), each a softmax over the sequence's tokens.

    Source: BERT's question answering (Devlin et al. 2018, arXiv 1810.04805, section 4.2).
    Shapes: hidden [B, S, H], weight [2, H], bias [2], labels [B, S] of START and END bits, loss_mask [B, S]: 1 for
    tokens, 0 for padding. Parallel: as `label_loss`.
    """
    scores = linear(hidden, weight, bias).float()
    scores = scores.masked_fill(loss_mask.unsqueeze(-1) == 0, torch.finfo(torch.float32).min)
    log_probabilities = F.log_softmax(scores, dim=1)
    answered = span_counts(labels, loss_mask).amax(1)
    total = scores.new_zeros(())
    for place, bit in enumerate((START, END)):
        at = (labels & bit).ne(0).int().argmax(1, keepdim=True)
        total = total - (log_probabilities[..., place].gather(1, at).squeeze(1) * answered).sum() / 2
    return LossTerm(total, answered.sum())


def span_counts(labels: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """1 where an answer starts that also ends within its sequence, else 0. Shapes: [B, S] -> float [B, S]."""
    kept = loss_mask.ne(0)
    has_end = ((labels & END).ne(0) & kept).any(1, keepdim=True)
    return ((labels & START).ne(0) & kept & has_end).float()
