"""Where a parameter's shard lies in the logical tensor: the basis of any-layout checkpoints and initialisation.

This module is pure arithmetic on shapes (no process group). Invariant: the shards of all tensor-parallel ranks, laid
side by side along `dim`, are exactly the logical tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is divided over the tensor-parallel axis.

    logical_shape: the shape of the whole tensor, independent of any layout.
    dim: the tensor dimension that is divided, or None where every rank holds the whole tensor.
    """

    logical_shape: tuple[int, ...]
    dim: int | None = None

    @property
    def axis(self) -> str | None:
        """The parallel axis that divides the tensor: "tp", or None for a replicated one."""
        return None if self.dim is None else "tp"

    def shard_shape(self, tp_size: int) -> tuple[int, ...]:
        """The shape on one rank of `tp_size`. Raises ValueError if the dimension does not divide."""
        if self.dim is None:
            return self.logical_shape
        extent = self.logical_shape[self.dim]
        if extent % tp_size:
            raise ValueError(f"dimension {self.dim} of {self.logical_shape} does not divide over {tp_size} ranks")
        shape = list(self.logical_shape)
        shape[self.dim] = extent // tp_size
        return tuple(shape)

    def shard_numel(self, tp_size: int) -> int:
        """Elements on one rank of `tp_size`."""
        return math.prod(self.shard_shape(tp_size))

    def index(self, tp_rank: int, tp_size: int) -> tuple[slice, ...]:
        """The slices of the logical tensor that rank `tp_rank` of `tp_size` holds."""
        index = [slice(0, extent) for extent in self.logical_shape]
        if self.dim is not None:
            width = self.shard_shape(tp_size)[self.dim]
            index[self.dim] = slice(tp_rank * width, (tp_rank + 1) * width)
        return tuple(index)

    def take(self, logical: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
        """A view of this rank's shard of the logical tensor."""
        if tuple(logical.shape) != self.logical_shape:
            raise ValueError(f"tensor of shape {tuple(logical.shape)} given for logical shape {self.logical_shape}")
        return logical[self.index(tp_rank, tp_size)]


def set_shard_spec(parameter: torch.nn.Parameter, spec: ShardSpec) -> torch.nn.Parameter:
    """Attach the spec to the parameter, with the marks by which DeepSpeed tells sharded from replicated parameters."""
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    if spec.dim is not None:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.model_parallel = True  # type: ignore[attr-defined]
    return parameter


def get_shard_spec(parameter: torch.nn.Parameter) -> ShardSpec:
    """The spec attached by `set_shard_spec`. Every parameter of a model has one; a missing one is a defect."""
    spec = getattr(parameter, "shard_spec", None)
    assert spec is not None, "parameter without a ShardSpec"
    return spec
