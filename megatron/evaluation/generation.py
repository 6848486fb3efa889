"""Continue prompts for tasks that judge generated text.

Invariant: the text never goes past the first stop string; what follows it is cut off by the caller.
"""

from __future__ import annotations

import torch

from megatron.evaluation.scoring import Prompts
from megatron.model.build import Transformer
from megatron.tokenizer.base import Tokenizer


@torch.no_grad()
def generate_batch(model: Transformer, tokenizer: Tokenizer, batch: Prompts) -> list[str]:
    """One text for each prompt, without the end-of-document token.

    Parallel: tensor-parallel ranks call it together and get the same texts.
    """
    settings = batch.settings
    device = model.output_weight.device
    rows = [list(prompt) for prompt in batch.prompts]
    lengths = [len(row) for row in rows]
    texts = [""] * len(rows)
    active = list(range(len(rows)))
    for _ in range(settings.max_new_tokens):
        width = max(len(rows[index]) for index in active)
        tokens = torch.tensor([rows[index] + [0] * (width - len(rows[index])) for index in active], device=device)
        last = torch.tensor([len(rows[index]) - 1 for index in active], device=device)
        hidden = model(tokens)[torch.arange(len(active), device=device), last]
        for index, token in zip(list(active), model.logits(hidden).argmax(-1).tolist(), strict=True):
            if token == tokenizer.eod_id:
                active.remove(index)
                continue
            rows[index].append(token)
            texts[index] = tokenizer.decode(rows[index][lengths[index] :])
            if any(stop in texts[index] for stop in settings.stops):
                active.remove(index)
        if not active:
            break
    return texts
