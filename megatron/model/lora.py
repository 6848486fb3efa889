"""Which linear layers of a block get a low-rank update, and which parameters are then trained.

The update itself is `megatron.parallel.layers.LowRankUpdate`. Invariant: with `b` at its initial zero the model
computes what it computed before.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from megatron.model.dropout import Dropout
from megatron.model.soft_prompt import SOFT_PROMPT_WEIGHT
from megatron.model.spec import ModelSpec
from megatron.parallel.layers import ColumnParallelLinear, LowRankUpdate, RowParallelLinear, SharedColumnLinear
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream
from megatron.parallel.sharding import get_shard_spec

UPDATE = "lora"


def add_updates(block: nn.Module, spec: ModelSpec, groups: ProcessGroups, stream: RandomStream | None) -> None:
    """Give the block's targeted layers their updates, not yet filled."""
    if spec.lora is None:
        return
    for name, layer in list(block.named_modules()):
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear | SharedColumnLinear):
            continue
        if name.rpartition(".")[2] not in spec.lora.targets:
            continue
        # Each rank has features of its own as input of a row-parallel layer, and the same ones as input of the others.
        is_divided = isinstance(layer, RowParallelLinear) and groups.tp_size > 1
        layer.lora = LowRankUpdate(
            get_shard_spec(layer.weight),
            spec.lora.rank,
            spec.lora.alpha / spec.lora.rank,
            groups,
            dropout=Dropout(spec.lora.dropout, stream, is_divided=is_divided),
            rows=layer.rows if isinstance(layer, SharedColumnLinear) else None,
        )


def is_update(name: str) -> bool:
    """Whether a public name is that of a low-rank matrix."""
    return name.endswith((f".{UPDATE}.a", f".{UPDATE}.b"))


def is_trained(name: str, spec: ModelSpec, train: Sequence[str], freeze: Sequence[str]) -> bool:
    """Whether a parameter learns: patterns (`*`, `?`, `[...]`) of public names, `freeze` before `train`.

    Without `train`: what low-rank updates and soft prompts add, where there are any, and a head of labels; else
    everything.
    """
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in freeze):
        return False
    if is_update(name) or name == SOFT_PROMPT_WEIGHT:
        return True
    if spec != spec.base and spec.task != "causal_lm" and name.startswith("head."):
        return True  # a new head has nothing to update
    if train or spec != spec.base:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in train)
    return True
