"""Next-token prediction.

An objective knows nothing of accumulation, data parallelism or loss scaling. Invariant: `LossTerm.sum` is a plain sum
over tokens, so that terms of any micro-batches may be added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.ops.cross_entropy import linear_cross_entropy
from megatron.parallel.process_groups import ProcessGroups


@dataclass(frozen=True)
class LossTerm:
    """Loss of one micro-batch: the fp32 sum over its unmasked tokens (with gradient) and their number (without)."""

    sum: torch.Tensor
    count: torch.Tensor


def language_model_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    vocab_size: int,
    groups: ProcessGroups,
    bias: torch.Tensor | None = None,
) -> LossTerm:
    """Sum of -log p(label) over the tokens whose mask is 1.

    Shapes: hidden [B, T, H], weight [V / tp_size, H], bias [V / tp_size], labels int64 [B, T], loss_mask float [B, T].
    Parallel: hidden replicated over the tensor-parallel ranks, the weight's rows divided; the result is the same on
    all of them.
    """
    mask = loss_mask.reshape(-1).float()
    total = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        mask,
        group=groups.tp,
        vocab_start=groups.tp_rank * weight.shape[0],
        valid_vocab=vocab_size,
        bias=bias,
    )
    return LossTerm(total, mask.sum())
