"""Normalisation over the last dimension, statistics in fp32 whatever the dtype of the input.

No parameters are held here. Invariant: eps stands inside the square root of layernorm and
rmsnorm, and is the least length that scalenorm divides by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` (Ba et al. 2016, arXiv 1607.06450).

    Shapes: x [..., H]; weight, bias [H] in the dtype of x. torch's kernels accumulate half inputs in fp32.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich 2019, arXiv 1910.07467).

    Shapes: x [..., H]; weight [H] in the dtype of x. torch's kernel computes half inputs in fp32.
    """
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def scale_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / max(|x|, eps) * weight` with one number for a weight (Nguyen & Salazar 2019, arXiv 1910.05895, equation 3).

    Shapes: x [..., H]; weight [1] in the dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(eps)).to(x.dtype) * weight
