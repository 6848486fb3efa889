"""One process, fp64, plain PyTorch: what every layout is compared with.

It shares the layers of `megatron.model` and nothing else: no DeepSpeed, no engine, no fused or chunked loss, no
vocabulary padding in the softmax, torch's own AdamW and clipping. Its own rounding error is near 1e-15, so every
difference seen is the layout's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron.model.build import Transformer, build_model
from megatron.optim.parameter_groups import parameter_groups
from tests.distributed.layout_cases import (
    BETAS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Case,
    global_batch,
    learning_rate,
    tiny_spec,
)

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def oracle_run(case: Case) -> dict[str, Any]:
    """Losses, gradient norms, a validation loss, and per kind every logical tensor after the last step, in fp64."""
    model = build_model(tiny_spec(**case.spec), seed=case.seed).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.is_trained(name))
    named = list(model.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameter_groups(trained, WEIGHT_DECAY, case.lr_factor),
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=case.eps,
        foreach=False,
    )
    losses, norms = [], []
    for step in range(case.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["lr_factor"]
        loss = mean_loss(model, case, step)
        loss.backward()
        limit = case.clipping or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        valid = float(mean_loss(model, case, 10_000))
    tensors: dict[str, dict[str, torch.Tensor]] = {"weight": {name: p.detach() for name, p in named}}
    for kind in KINDS[1:]:
        tensors[kind] = {name: optimizer.state[p][kind] for name, p in trained}
    return {"losses": losses, "norms": norms, "valid": valid, **tensors}


def mean_loss(model: Transformer, case: Case, step: int) -> torch.Tensor:
    """The loss of a whole step by the definition: a mean over micro-batches of means, or one mean over all tokens."""
    tokens, labels, mask = global_batch(step, case)
    if model.spec.task == "question_answering":
        return _mean_span_loss(model, case, tokens, labels, mask)
    classes = model.spec.num_labels or model.spec.vocab_size
    logits = F.linear(model(tokens), model.output_weight, model.output_bias)[..., :classes]
    per_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
    if case.normalization == "tokens":
        return per_token.sum() / mask.sum()
    sums = per_token.view(-1, case.micro_batch * case.seq_length).sum(1)
    counts = mask.double().view(-1, case.micro_batch * case.seq_length).sum(1)
    return (sums / counts.clamp(min=1.0)).mean()


def _mean_span_loss(
    model: Transformer, case: Case, tokens: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Sequence by sequence: minus the mean log-probability of the answer's first and last token among the unmasked."""
    scores = F.linear(model(tokens), model.output_weight, model.output_bias)
    per_sequence, counts = [], []
    for row in range(len(tokens)):
        kept = mask[row].bool()
        start, end = ((labels[row] & bit).nonzero()[:, 0] for bit in (1, 2))
        is_answered = bool(kept[start].all() and kept[end].all())
        loss = scores[row].sum() * 0.0
        if is_answered:
            for place, at in ((0, start), (1, end)):
                column = scores[row, :, place].masked_fill(~kept, torch.finfo(torch.float32).min)
                loss = loss - column.log_softmax(0)[at[0]] / 2
        per_sequence.append(loss)
        counts.append(float(is_answered))
    losses, answered = torch.stack(per_sequence), torch.tensor(counts, dtype=torch.float64)
    if case.normalization == "tokens":
        return losses.sum() / answered.sum()
    micro = answered.view(-1, case.micro_batch).sum(1).clamp(min=1.0)
    return (losses.view(-1, case.micro_batch).sum(1) / micro).mean()
