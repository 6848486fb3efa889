"""Scores of rows against the whole table of log-probabilities."""

from __future__ import annotations

import pytest
import torch

from megatron.evaluation.scoring import Continuation, score_batch
from tests.unit.evaluation import tiny


def rows(seed: int, count: int) -> list[Continuation]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, tiny.MAX_POSITIONS + 2, (), generator=draw))
        tokens = torch.randint(0, 300, (length,), generator=draw).tolist()
        made.append(Continuation(tokens, int(torch.randint(1, length, (), generator=draw))))
    return made


def oracle(model: torch.nn.Module, row: Continuation) -> float:
    ids = torch.tensor([list(row.tokens)])
    with torch.no_grad():
        logits = model.logits(model(ids[:, :-1])).double()
    table = torch.log_softmax(logits[0], -1).gather(1, ids[0, 1:, None])
    return float(table[-row.num_scored :].sum())


@pytest.mark.parametrize("tied", [False, True])
def test_score_is_the_sum_of_log_probabilities(tied: bool) -> None:
    model = tiny.model(tied=tied)
    made = rows(1, 13)
    scores = score_batch(model, made)
    assert [score.logprob for score in scores] == pytest.approx([oracle(model, row) for row in made], rel=2e-6)


def test_batch_of_one_equals_batch_of_eight() -> None:
    model = tiny.model()
    made = rows(2, 8)
    together = score_batch(model, made)
    for row, score in zip(made, together, strict=True):
        (alone,) = score_batch(model, [row])
        assert alone.logprob == pytest.approx(score.logprob, rel=2e-6)
        assert alone.is_greedy == score.is_greedy


def test_padding_rows_of_the_vocabulary_take_no_part() -> None:
    model = tiny.model()
    made = rows(3, 5)
    before = score_batch(model, made)
    with torch.no_grad():
        model.output_weight[300:] = 50.0
    assert score_batch(model, made) == before


def test_half_precision_model_is_scored_in_fp32() -> None:
    model = tiny.model().to(torch.bfloat16)
    made = rows(4, 6)
    with torch.no_grad():
        hidden = [model(torch.tensor([list(row.tokens)[:-1]])) for row in made]
    for row, score, states in zip(made, score_batch(model, made), hidden, strict=True):
        logits = torch.nn.functional.linear(states[0].float(), model.output_weight[:300].detach().float())
        table = torch.log_softmax(logits, -1).gather(1, torch.tensor(row.tokens)[1:, None])
        # Rows in one batch differ from rows alone by bf16 rounding in the layers: about 2 parts in a hundred here.
        assert score.logprob == pytest.approx(float(table[-row.num_scored :].sum()), rel=3e-2)
