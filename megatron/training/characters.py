"""Perplexity per character (`char_level_ppl`): comparable between tokenizers, as perplexity per token is not.

Invariant: the ratio is that of the learnt tokens of the batches counted, over all data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron.data.loader import Batch
from megatron.parallel.process_groups import ProcessGroups


class CharacterCount:
    """Counts tokens, and characters of their text. decode: ids -> text."""

    def __init__(self, decode: Callable[[list[int]], str], groups: ProcessGroups, device: torch.device) -> None:
        self.decode, self.groups, self.device = decode, groups, device
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._tokens = self._characters = 0

    def add(self, batches: Sequence[Batch]) -> None:
        """Count this rank's micro-batches."""
        for batch in batches:
            for labels, mask in zip(batch.labels, batch.loss_mask, strict=True):
                ids = labels[mask > 0].tolist()
                self._tokens += len(ids)
                self._characters += len(self.decode(ids))

    def tokens_per_character(self) -> float:
        """Of everything counted since the last reset. Collective over data-parallel ranks."""
        total = torch.tensor([self._tokens, self._characters], dtype=torch.float32, device=self.device)
        if self.groups.dp is not None:
            dist.all_reduce(total, group=self.groups.dp)
        tokens, characters = total.tolist()
        return tokens / max(1.0, characters)
