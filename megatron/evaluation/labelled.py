"""Scores of a model that predicts labels, on token and label files.

Results have the form of lm-eval's, so that tables, logs and files are made of both alike. Invariant: every document
counts once, on whatever number of replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.data.indexed import IndexedDataset
from megatron.model.build import Transformer
from megatron.objectives.labels import END, START

Documents = tuple[IndexedDataset, IndexedDataset]


def evaluate_labelled(
    model: Transformer,
    data: Mapping[str, Documents],
    *,
    batch_size: int,
    max_length: int,
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """Scores by data set. Collective; the same on all ranks.

    sequence_classification, token_classification: accuracy, and the mean F1 of the labels that occur.
    question_answering: exact_match of the predicted with the true tokens, and F1 of their overlap.
    """
    results: dict[str, Any] = {"results": {}, "n-samples": {}, "config": dict(info)}
    for name, (tokens, labels) in data.items():
        score = _answers if model.spec.task == "question_answering" else _labels
        values, count = score(model, tokens, labels, batch_size, max_length)
        results["results"][name] = {f"{metric},none": value for metric, value in values.items()}
        results["n-samples"][name] = {"original": len(tokens), "effective": count}
    return results


@torch.no_grad()
def _scores(model: Transformer, documents: list[np.ndarray], max_length: int) -> list[torch.Tensor]:
    """The head's outputs for the inputs of each document, fp32 on the host: [tokens, num_labels]."""
    # The last token of a document is only there to carry the label of the one before.
    inputs = [document[:-1][:max_length] for document in documents]
    width = max(map(len, inputs))
    batch = torch.zeros((len(inputs), width), dtype=torch.int64)
    for row, ids in enumerate(inputs):
        batch[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
    scores = model.logits(model(batch.to(model.output_weight.device))).float().cpu()
    return [scores[row, : len(ids)] for row, ids in enumerate(inputs)]


def _batches(model: Transformer, tokens: IndexedDataset, batch_size: int) -> list[list[int]]:
    mine = list(range(len(tokens)))[model.groups.dp_rank :: model.groups.dp_size]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def _labels(
    model: Transformer, tokens: IndexedDataset, labels: IndexedDataset, batch_size: int, max_length: int
) -> tuple[dict[str, float], int]:
    classes = model.spec.num_labels
    confusion = torch.zeros((classes, classes), dtype=torch.float64)  # [true, predicted]
    for numbers in _batches(model, tokens, batch_size):
        for number, scores in zip(numbers, _scores(model, [tokens[n] for n in numbers], max_length), strict=True):
            true = torch.from_numpy(labels[number][1:].astype(np.int64))[: len(scores)]
            known = true >= 0
            pairs = true[known] * classes + scores.argmax(1)[known]
            confusion += pairs.bincount(minlength=classes * classes).view(classes, classes)
    _sum_over_replicas(model, confusion)
    right, total = confusion.diag(), confusion.sum()
    occurs = confusion.sum(1) > 0
    f1 = 2 * right / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    return {
        "accuracy": float(right.sum() / total.clamp(min=1)),
        "macro_f1": float(f1[occurs].mean()) if bool(occurs.any()) else 0.0,
    }, int(total)


def _answers(
    model: Transformer, tokens: IndexedDataset, labels: IndexedDataset, batch_size: int, max_length: int
) -> tuple[dict[str, float], int]:
    sums = torch.zeros(3, dtype=torch.float64)  # exact, F1, answers
    for numbers in _batches(model, tokens, batch_size):
        for number, scores in zip(numbers, _scores(model, [tokens[n] for n in numbers], max_length), strict=True):
            true = labels[number][1:][: len(scores)]
            starts, ends = (np.flatnonzero((true > 0) & (true & bit > 0)) for bit in (START, END))
            if len(starts) and len(ends):
                found = best_span(scores)
                sums += torch.tensor([*_overlap(found, (int(starts[0]), int(ends[0]))), 1.0], dtype=torch.float64)
    _sum_over_replicas(model, sums)
    exact, f1, count = sums.tolist()
    return {"exact_match": exact / max(count, 1), "f1": f1 / max(count, 1)}, int(count)


def best_span(scores: torch.Tensor) -> tuple[int, int]:
    """The likeliest (first, last) token with first <= last. Shapes: scores [tokens, 2]."""
    best_start = scores[:, 0].cummax(0)
    end = int((best_start.values + scores[:, 1]).argmax())
    return int(best_start.indices[end]), end


def _overlap(found: tuple[int, int], true: tuple[int, int]) -> tuple[float, float]:
    common = max(0, min(found[1], true[1]) - max(found[0], true[0]) + 1)
    return float(found == true), 2.0 * common / (found[1] - found[0] + true[1] - true[0] + 2)


def _sum_over_replicas(model: Transformer, sums: torch.Tensor) -> None:
    if model.groups.dp is not None:
        on_device = sums.to(model.output_weight.device)
        dist.all_reduce(on_device, group=model.groups.dp)
        sums.copy_(on_device)
