"""The distribution that is drawn from, against transformers' and by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron.inference.sampling import Sampling


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_probabilities_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(4, 1, dtype=torch.int64), logits.clone()).softmax(-1)
    torch.testing.assert_close(Sampling(temperature, top_k, top_p).probabilities(logits), expected)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, kept in ((0.4, [1.0, 0, 0]), (0.6, [0.625, 0.375, 0]), (0.9, [0.5, 0.3, 0.2])):
        torch.testing.assert_close(Sampling(top_p=top_p).probabilities(logits), torch.tensor([kept]))


def test_greedy_only_when_all_are_off() -> None:
    assert Sampling().is_greedy
    assert Sampling().choose(torch.tensor([[0.1, 0.9, 0.3]]), []) == [1]
    for sampling in (Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.5)):
        assert not sampling.is_greedy
    assert Sampling(top_k=1).choose(torch.tensor([[0.1, 0.9, 0.3]]), [torch.Generator()]) == [1]


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    generator = torch.Generator().manual_seed(1)
    drawn = [Sampling(temperature=1.0).choose(logits, [generator])[0] for _ in range(3000)]
    frequencies = torch.bincount(torch.tensor(drawn), minlength=3) / 3000
    assert (frequencies - torch.tensor([0.1, 0.2, 0.7])).abs().max() < 0.03
