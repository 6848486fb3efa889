"""The normalisations of a model: of the residual stream, and of single heads.

Invariant: weights are replicated on every tensor-parallel rank and get the same gradient on all.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.model.spec import ModelSpec
from megatron.ops.norms import layer_norm, rms_norm, scale_norm
from megatron.parallel.collectives import shared_parameter, summed_gradient
from megatron.parallel.layers import sharded_parameter
from megatron.parallel.process_groups import ProcessGroups


class Norm(nn.Module):
    """The spec's norm over the last dimension.

    size: that dimension (None: H). inside: it stands within a tensor-parallel region, on this rank's heads.
    scale: what the result is multiplied with.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: ProcessGroups,
        *,
        size: int | None = None,
        inside: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.groups, self.scale = spec.norm, spec.norm_eps, groups, scale
        self.offset = 1.0 if spec.norm_offset else 0.0
        self.share = summed_gradient if inside else shared_parameter
        size = size or spec.hidden_size
        if spec.norm == "non_parametric_layernorm":
            self.weight = self.bias = None
            return
        self.weight = sharded_parameter((1 if spec.norm == "scalenorm" else size,), None, 1)
        self.bias = sharded_parameter((size,), None, 1) if spec.norm == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: [..., size] -> [..., size]."""
        normed = self._normed(x)
        return normed if self.scale == 1.0 else normed * self.scale

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.share(self.weight, self.groups)
        if weight is not None and self.offset:
            weight = weight + self.offset
        if self.kind == "rmsnorm":
            return rms_norm(x, weight, self.eps)
        if self.kind == "scalenorm":
            assert weight is not None
            return scale_norm(x, weight, self.eps)
        return layer_norm(x, weight, None if self.bias is None else self.share(self.bias, self.groups), self.eps)
