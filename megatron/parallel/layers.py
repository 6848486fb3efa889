"""Linear and embedding layers whose weights are divided over the tensor-parallel ranks.

Weights are created empty; `megatron.parallel.init` fills them as a function of seed and name. Every parameter carries its
ShardSpec. Not here: normalisation (replicated on every rank) and the output head's loss (megatron.ops.cross_entropy).
Invariant: shards are contiguous slices of the logical tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron.parallel.collectives import copy_to_tp, reduce_from_tp
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.sharding import ShardSpec, set_shard_spec


def sharded_parameter(logical_shape: tuple[int, ...], dim: int | None, tp_size: int) -> nn.Parameter:
    """An uninitialised parameter of this rank's shard, in fp32 on the default device."""
    spec = ShardSpec(logical_shape, dim)
    return set_shard_spec(nn.Parameter(torch.empty(spec.shard_shape(tp_size), dtype=torch.float32)), spec)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features divided over the ranks.

    Shapes: x [..., in], replicated -> [..., out / tp_size].
    Parallel: weight [out, in] and bias [out] divided along dim 0.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((out_features, in_features), 0, groups.tp_size)
        self.bias = sharded_parameter((out_features,), 0, groups.tp_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(copy_to_tp(x, self.groups.tp), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features divided over the ranks.

    Shapes: x [..., in / tp_size] -> [..., out], replicated.
    Parallel: weight [out, in] divided along dim 1; the bias is replicated and added once, after the sum, so that the function
    is the same at every tp_size (upstream adds it on every rank with gpt_j_residual: upstream.md 3.7).
    `reduce=False` returns the rank's partial sum without bias, for a caller that sums two such layers in one all-reduce.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((out_features, in_features), 1, groups.tp_size)
        self.bias = sharded_parameter((out_features,), None, groups.tp_size) if bias else None

    def forward(self, x: torch.Tensor, *, reduce: bool = True) -> torch.Tensor:
        if self.groups.tp is None and reduce:
            return F.linear(x, self.weight, self.bias)
        partial = F.linear(x, self.weight)
        if not reduce:
            return partial
        total = reduce_from_tp(partial, self.groups.tp)
        return total if self.bias is None else total + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of the table divided over the ranks; each looks up what it has, and the results are summed.

    Shapes: tokens int64 [B, T] -> [B, T, H], replicated.
    Parallel: weight [V, H] divided along dim 0.
    """

    def __init__(self, num_rows: int, hidden_size: int, *, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((num_rows, hidden_size), 0, groups.tp_size)
        self.first_row = groups.tp_rank * self.weight.shape[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.groups.tp is None:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first_row
        foreign = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return reduce_from_tp(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.groups.tp)
