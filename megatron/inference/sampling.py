"""Choosing the next token from logits.

Invariant: the choice for a row depends on its own logits and its own generator, never on the other rows of the batch.
Source: top-p, Holtzman et al. 2020 (arXiv 1904.09751, equation 2); top-k, Fan et al. 2018 (arXiv 1805.04833).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """temperature divides the logits (0: not divided); top_k and top_p limit the choice (0: off). All 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 and self.top_k == 0 and self.top_p == 0

    def choose(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """The next token of each row. Shapes: logits [B, V], one CPU generator a row -> B ids."""
        if self.is_greedy:
            return logits.argmax(-1).tolist()
        probabilities = self.probabilities(logits.float().cpu())
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, generators, strict=True)
        ]
        return torch.cat(drawn).tolist()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What is drawn from, after temperature, then top-k, then top-p. Shapes: [B, V] -> [B, V]."""
        if self.temperature > 0:
            logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(-1)
        if 0 < self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # A token stays if those before it do not yet reach top_p: the smallest set that does, never empty.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return probabilities / probabilities.sum(-1, keepdim=True)
