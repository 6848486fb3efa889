"""Log-probabilities of given continuations, batch by batch.

Rows are padded on the right, where a causal model does not look, and only the continuation's positions meet the head.
Not here: which rank scores what (megatron.evaluation.team), and what a score means (megatron.evaluation.harness).
Invariant: a row's score does not depend on the rows beside it (beyond the rounding of the matrix products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.model.build import Transformer
from megatron.ops.cross_entropy import token_losses


@dataclass(frozen=True)
class Continuation:
    """Tokens of which the last `num_scored` are to be scored, given all before them; 0 < num_scored < len(tokens)."""

    tokens: Sequence[int]
    num_scored: int


@dataclass(frozen=True)
class Score:
    """logprob: sum over the continuation, in nats. is_greedy: whether every token of it is the likeliest one."""

    logprob: float
    is_greedy: bool


@torch.no_grad()
def score_batch(model: Transformer, rows: Sequence[Continuation]) -> list[Score]:
    """Score one batch. Softmax in fp32 over the real vocabulary, whatever type the model computes in.

    Parallel: tensor-parallel ranks call it together with equal rows and get equal scores.
    """
    device = model.output_weight.device
    width = max(len(row.tokens) for row in rows) - 1
    # Any id would do as padding: no scored position sees it.
    tokens = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.empty(sum(row.num_scored for row in rows), dtype=torch.int64)
    positions = torch.empty_like(labels)
    filled = 0
    for index, row in enumerate(rows):
        ids, length, scored = torch.tensor(row.tokens), len(row.tokens) - 1, row.num_scored
        tokens[index, :length] = ids[:-1]
        labels[filled : filled + scored] = ids[-scored:]
        positions[filled : filled + scored] = torch.arange(length - scored, length) + index * width
        filled += scored
    hidden = model(tokens.to(device)).flatten(0, 1)
    weight = model.output_weight
    losses, matches = token_losses(
        hidden.index_select(0, positions.to(device)),
        weight,
        labels.to(device),
        group=model.groups.tp,
        vocab_start=model.groups.tp_rank * weight.shape[0],
        valid_vocab=model.spec.vocab_size,
        bias=model.output_bias,
    )
    counts = [row.num_scored for row in rows]
    return [
        Score(-float(loss.sum()), bool(match.all()))
        for loss, match in zip(losses.double().cpu().split(counts), matches.cpu().split(counts), strict=True)
    ]
