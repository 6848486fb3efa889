"""Tensor-parallel communication with each operation's adjoint named beside it.

    forward                 backward
    copy_to_tp: identity    all-reduce (sum)      entry of a column-parallel layer
    reduce_from_tp: sum     identity              exit of a row-parallel layer

Every function is the identity where `group` is None (one tensor-parallel rank). Not here: data-parallel reduction (DeepSpeed's)
and the vocabulary-parallel loss (megatron.ops.cross_entropy).
Source: Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053), section 3, operators f and g.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The gradient may be a view of something autograd still needs, or expanded: reduce a copy of our own.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        # In place: x is the fresh product of a matmul, which keeps no reference to its output.
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def copy_to_tp(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Enter a region where every tensor-parallel rank computes a part: identity, whose gradient is summed over the ranks."""
    return x if group is None else _CopyToTP.apply(x, group)


def reduce_from_tp(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Leave such a region: the sum over the ranks (x is overwritten), whose gradient passes unchanged."""
    return x if group is None else _ReduceFromTP.apply(x.contiguous(), group)


def gather_last_dim(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Concatenate the ranks' shards along the last dimension; without gradient, for inference.

    Shapes: [..., n] -> [..., n * tp_size].
    """
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
