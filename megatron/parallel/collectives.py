"""Tensor-parallel communication with each operation's adjoint named beside it.

    operation              forward                     backward
    enter_region           identity                    all-reduce            entry of column-parallel layers
      sequence parallel    all-gather of tokens        reduce-scatter
    leave_region           all-reduce                  identity              exit of row-parallel layers
      sequence parallel    reduce-scatter of tokens    all-gather
    gather_sequence        all-gather of tokens        own slice             before the loss, whose gradient is whole
    split_sequence         own slice                   all-gather
    shared_parameter       identity                    all-reduce            a replicated parameter used on a part of
    the tokens

Every function is the identity with one tensor-parallel rank. Not here: data-parallel reduction (DeepSpeed's) and the
vocabulary-parallel loss (megatron.ops.cross_entropy).
Sources: Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053), section 3, operators f and g; Korthikanti et al. 2022
(arXiv 2205.05198), section 4.2.2, operators g and g-bar.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.process_groups import ProcessGroups

# Hidden states are [B, T, H]: sequence parallelism divides T.
SEQUENCE_DIM = 1


class _Identity(torch.autograd.Function):
    """Forward identity, backward all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The gradient may be a view of something autograd still needs, or expanded: reduce a copy of our own.
        total = grads[0].clone(memory_format=torch.contiguous_format)
        return _all_reduce(total, ctx.groups), None


class _AllReduce(torch.autograd.Function):
    """Forward all-reduce, backward identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
        # In place: x is the fresh product of a layer that keeps no reference to its output. It is not marked dirty,
        # because autograd forbids that for the views that some matmuls return.
        return _all_reduce(x, groups).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _GatherThenReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
        ctx.groups = groups
        return _all_gather(x, groups.tp)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce_scatter(grads[0], ctx.groups), None


class _ReduceScatterThenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
        ctx.groups = groups
        return _reduce_scatter(x, groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(grads[0], ctx.groups.tp), None


class _GatherThenSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
        ctx.groups = groups
        return _all_gather(x, groups.tp)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_slice(grads[0], ctx.groups.tp).contiguous(), None


class _SliceThenGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
        ctx.groups = groups
        return _own_slice(x, groups.tp).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(grads[0], ctx.groups.tp), None


def enter_region(x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Enter layers whose features are divided over the ranks. Shapes: [B, T, H], or [B, T / tp, H] -> [B, T, H]."""
    if groups.tp is None:
        return x
    return _apply(_GatherThenReduceScatter if groups.sequence_parallel else _Identity, x, groups)


def leave_region(x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Sum the ranks' parts (x is overwritten). Shapes: [B, T, H] -> [B, T, H], or [B, T / tp, H]."""
    if groups.tp is None:
        return x
    return _apply(_ReduceScatterThenGather if groups.sequence_parallel else _AllReduce, x.contiguous(), groups)


def gather_sequence(x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Whole sequences on every rank, for a consumer whose gradient is whole on every rank as well."""
    if groups.tp is None or not groups.sequence_parallel:
        return x
    return _apply(_GatherThenSlice, x, groups)


def split_sequence(x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """This rank's part of every sequence, from a tensor that is whole on every rank."""
    if groups.tp is None or not groups.sequence_parallel:
        return x
    return _apply(_SliceThenGather, x, groups)


def shared_parameter(parameter: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """A replicated parameter where tokens are divided: each rank sees a part of its gradient, all get the sum."""
    if groups.tp is None or not groups.sequence_parallel:
        return parameter
    return _apply(_Identity, parameter, groups)


def summed_gradient(parameter: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """A replicated parameter of which each rank uses another part: all get the sum of the gradients."""
    return parameter if groups.tp is None else _apply(_Identity, parameter, groups)


def gather_last_dim(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Concatenate the ranks' shards along the last dimension; without gradient, for inference.

    Shapes: [..., n] -> [..., n * tp_size].
    """
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


@torch.compiler.disable
def _apply(function: type[torch.autograd.Function], x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Run a collective. A compiler's graph ends before it and a new one begins behind."""
    return function.apply(x, groups)


def _all_reduce(x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Sum over the tensor-parallel ranks, in place."""
    if not groups.sums_in_fp32 or x.dtype == torch.float32:
        dist.all_reduce(x, group=groups.tp)
        return x
    wide = x.float()
    dist.all_reduce(wide, group=groups.tp)
    return x.copy_(wide)


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    x = x.contiguous()
    parts = x.new_empty((ranks, *x.shape))
    dist.all_gather_into_tensor(parts.view(-1, *x.shape[1:]), x, group=group)
    # [tp, B, T / tp, H] -> [B, T, H]
    return parts.transpose(0, 1).reshape(x.shape[0], ranks * x.shape[1], *x.shape[2:])


def _reduce_scatter(x: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    ranks, dtype = groups.tp_size, x.dtype
    if groups.sums_in_fp32:
        x = x.float()
    B, T, *rest = x.shape
    parts = x.reshape(B, ranks, T // ranks, *rest).transpose(0, 1).contiguous()
    own = x.new_empty((B, T // ranks, *rest))
    dist.reduce_scatter_tensor(own, parts.view(-1, *parts.shape[2:]), group=groups.tp)
    return own.to(dtype)


def _own_slice(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    width = x.shape[SEQUENCE_DIM] // dist.get_world_size(group)
    return x.narrow(SEQUENCE_DIM, dist.get_rank(group) * width, width)
