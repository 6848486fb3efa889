"""What positions add to attention scores: ALiBi's slopes and T5's buckets; and the sinusoidal table.

No parameters are held here. Invariant: a bias is a function of key position minus query position alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """fp32 [N]: 2^(-8/n), 2^(-16/n), ... for the largest power of two n <= N, then every other one of 2n's for the
    rest (Press et al. 2021, arXiv 2108.12409, section 3 and its reference implementation)."""

    def powers(count: int, step: int) -> list[float]:
        return [2 ** (-8.0 * index / count) for index in range(1, count + 1, step)]

    whole = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(powers(whole, 1) + powers(2 * whole, 2)[: num_heads - whole], dtype=torch.float32)


def relative_positions(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Key position minus query position. Shapes: [B or 1, T], [B or 1, S] -> int64 [B or 1, 1, T, S]."""
    return (key_positions[:, None, :] - query_positions[:, :, None]).unsqueeze(1)


def alibi_bias(slopes: Tensor, relative: Tensor) -> Tensor:
    """`slope * (key - query)`. Shapes: slopes [N], relative [B, 1, T, S] -> fp32 [B, N, T, S]."""
    return slopes.view(1, -1, 1, 1) * relative


def rpe_buckets(relative: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of every distance back: exact for the nearer half, logarithmic up to `max_distance` beyond.

    Shapes: int64, as `relative`. Source: Raffel et al. 2020, T5 (arXiv 1910.10683, section 2.1), causal variant.
    """
    distance = (-relative).clamp_min(0)
    exact = num_buckets // 2
    ratio = (distance.float() / exact).clamp_min(1e-6).log() / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
    return torch.where(distance < exact, distance, far)


def sinusoids(positions: Tensor, hidden_size: int) -> Tensor:
    """Sines of all frequencies, then cosines of all, fp32. Shapes: positions [...] -> [..., H].

    Source: Vaswani et al. 2017 (arXiv 1706.03762, section 3.5), in upstream's order.
    """
    exponents = torch.arange(0, hidden_size, 2, device=positions.device).float() / hidden_size
    angles = positions.unsqueeze(-1).float() * (1.0 / 10000.0**exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :hidden_size]
