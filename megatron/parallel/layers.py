"""Linear and embedding layers whose weights are divided over the tensor-parallel ranks.

Weights are created empty; `megatron.parallel.init` fills them as a function of seed and name. Every parameter carries
its ShardSpec. Not here: normalisation (replicated on every rank) and the output head's loss
(megatron.ops.cross_entropy). Invariant: shards are contiguous slices of the logical tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron.ops.matmul import linear
from megatron.parallel.collectives import leave_region, shared_parameter, summed_gradient
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.sharding import ShardSpec, get_shard_spec, set_shard_spec


def sharded_parameter(logical_shape: tuple[int, ...], dim: int | None, tp_size: int) -> nn.Parameter:
    """An uninitialised parameter of this rank's shard, of the default dtype on the default device."""
    spec = ShardSpec(logical_shape, dim)
    return set_shard_spec(nn.Parameter(torch.empty(spec.shard_shape(tp_size))), spec)


class LowRankUpdate(nn.Module):
    """What is added to a linear layer's output while its own weight stays as it is: s B A x (Hu et al. 2021, LoRA,
    arXiv 2106.09685, equation 3), s = alpha / rank.

    Parallel: of the two matrices the one that touches the divided features is divided as the layer's weight is
    (`a` [rank, in] along dim 1 for divided inputs, `b` [out, rank] along dim 0 for divided outputs); the other one is
    replicated, and gets the sum of the ranks' gradients.
    Shapes: as the layer's own weight.
    """

    def __init__(
        self,
        weight: ShardSpec,
        rank: int,
        scale: float,
        groups: ProcessGroups,
        *,
        dropout: Callable[[torch.Tensor, bool], torch.Tensor],
        rows: slice | None = None,
    ) -> None:
        """rows: the output features of this rank, of a layer whose replicated weight holds those of all."""
        super().__init__()
        out_features, in_features = weight.logical_shape
        self.a = sharded_parameter((rank, in_features), 1 if weight.dim == 1 else None, groups.tp_size)
        self.b = sharded_parameter((out_features, rank), 0 if weight.dim == 0 else None, groups.tp_size)
        self.scale, self.groups, self.dropout, self.rows = scale, groups, dropout, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: as the layer's forward; for divided inputs this rank's summand."""
        a, b = (self._of_all(parameter) for parameter in (self.a, self.b))
        if self.rows is not None:
            b = b[self.rows]
        return linear(linear(self.dropout(x, self.training), a), b) * self.scale

    def _of_all(self, parameter: nn.Parameter) -> torch.Tensor:
        return summed_gradient(parameter, self.groups) if get_shard_spec(parameter).dim is None else parameter


class _Linear(nn.Module):
    """What the linear layers share: a weight, and perhaps a low-rank update of it."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.lora: LowRankUpdate | None = None

    def _updated(self, product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return product if self.lora is None else product + self.lora(x)


class ColumnParallelLinear(_Linear):
    """y = x W^T + b with the output features divided over the ranks. The caller has entered the region (collectives).

    Shapes: x [..., in], replicated -> [..., out / tp_size].
    Parallel: weight [out, in] and bias [out] divided along dim 0.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: ProcessGroups) -> None:
        super().__init__()
        self.weight = sharded_parameter((out_features, in_features), 0, groups.tp_size)
        self.bias = sharded_parameter((out_features,), 0, groups.tp_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._updated(linear(x, self.weight, self.bias), x)


class SharedColumnLinear(_Linear):
    """y = x W^T + b for output features of which several ranks need the same ones: too few blocks for all ranks.

    Shapes: x [..., in] -> [..., out / num_blocks], the block of this rank: ranks 0 .. r - 1 use block 0, and so on.
    Parallel: weight and bias are replicated and hold all blocks; every rank gets the sum of the gradients.
    """

    def __init__(
        self, in_features: int, out_features: int, num_blocks: int, *, bias: bool, groups: ProcessGroups
    ) -> None:
        super().__init__()
        self.groups = groups
        width = out_features // num_blocks
        first = groups.tp_rank * num_blocks // groups.tp_size * width
        self.rows = slice(first, first + width)
        self.weight = sharded_parameter((out_features, in_features), None, groups.tp_size)
        self.bias = sharded_parameter((out_features,), None, groups.tp_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else summed_gradient(self.bias, self.groups)[self.rows]
        weight = summed_gradient(self.weight, self.groups)[self.rows]
        return self._updated(linear(x, weight, bias), x)


class RowParallelLinear(_Linear):
    """y = x W^T + b with the input features divided over the ranks.

    Shapes: x [..., in / tp_size] -> [..., out], replicated (or this rank's tokens of it).
    Parallel: weight [out, in] divided along dim 1; the bias is replicated and added once, after the sum, so that the
    function is the same at every tp_size (upstream adds it on every rank with gpt_j_residual: upstream.md 3.7).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = sharded_parameter((out_features, in_features), 1, groups.tp_size)
        self.bias = sharded_parameter((out_features,), None, groups.tp_size) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.groups.tp is None:
            return self._updated(linear(x, self.weight, self.bias), x)
        return self.add_bias(leave_region(self.partial(x), self.groups))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's summand, without bias, for a caller that sums several layers in one reduction."""
        return self._updated(linear(x, self.weight), x)

    def add_bias(self, x: torch.Tensor) -> torch.Tensor:
        """The bias on top of a finished sum."""
        return x if self.bias is None else x + shared_parameter(self.bias, self.groups)


class VocabParallelEmbedding(nn.Module):
    """Rows of the table divided over the ranks; each looks up what it has, and the results are summed.

    Shapes: tokens int64 [B, T] -> [B, T, H], replicated (or this rank's tokens of it).
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
        return leave_region(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.groups)
