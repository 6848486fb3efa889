"""Virtual tokens before every sequence: a table that is trained while the model stays as it is (prompt tuning).

They come before the text, also before the first of several documents of a packed sequence, and count as positions: the
text's first token is at position num_tokens. Their hidden states go no further than the last layer, so that neither a
loss nor a logit is ever made of them. Source: Lester et al. 2021, arXiv 2104.08691; positions as PEFT has them.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.model.dropout import Dropout
from megatron.model.spec import ModelSpec
from megatron.parallel.collectives import gather_sequence, split_sequence
from megatron.parallel.layers import sharded_parameter
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream

SOFT_PROMPT = "soft_prompt"
SOFT_PROMPT_WEIGHT = f"{SOFT_PROMPT}.weight"


class SoftPromptEmbedding(nn.Module):
    """Put the virtual tokens' vectors before those of the text; they are not scaled as word embeddings may be.

    Parallel: weight [num_tokens, H] is replicated; every rank has its whole gradient. The text's vectors come whole,
    also with sequence parallelism, which divides what leaves.
    """

    def __init__(self, spec: ModelSpec, groups: ProcessGroups, stream: RandomStream | None = None) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((spec.num_virtual_tokens, spec.hidden_size), None, groups.tp_size)
        # With added positions the dropout comes after the sum, in their layer.
        probability = 0.0 if spec.has_position_layer else spec.hidden_dropout
        self.dropout = Dropout(probability, stream, is_divided=groups.sequence_parallel)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: x [B, S, H] -> [B, num_tokens + S, H]; with positions, which say that the text has begun before, x.

        With sequence parallelism this rank's part of it.
        """
        if positions is None:
            x = torch.cat([self.weight.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.dropout(split_sequence(x, self.groups), self.training)


def text_states(hidden: torch.Tensor, spec: ModelSpec, groups: ProcessGroups, *, begins: bool = True) -> torch.Tensor:
    """The normed hidden states as loss and head take them: of all tokens of the text, on every rank.

    begins: the sequence began in this pass, with its virtual tokens.
    Shapes: [B, T, H] -> [B, S, H].
    """
    whole = gather_sequence(hidden, groups)
    return whole[:, spec.num_virtual_tokens :] if begins and spec.soft_prompt else whole
