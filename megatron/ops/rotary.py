"""Rotary positions (Su et al. 2021, arXiv 2104.09864, equation 34) in the half-split form of GPT-NeoX.

The tables are fp32 in every precision: half-precision tables move the logits away from other implementations. This
module knows no cache and no layout. Invariant: a rotation changes no norm, and the backward pass is its inverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_frequencies(rotary_dims: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """`base^(-2i / rotary_dims)`, fp32 [rotary_dims / 2].

    Source: computed in fp32 in the order that transformers' GPTNeoX uses, so that both have the same bits.
    """
    exponents = torch.arange(0, rotary_dims, 2, dtype=torch.int64, device=device).float() / rotary_dims
    return 1.0 / (base**exponents)


def rotary_tables(
    num_positions: int, rotary_dims: int, base: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, fp32 [num_positions, rotary_dims / 2] each."""
    frequencies = rotary_frequencies(rotary_dims, base, device)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


class RotaryTable:
    """The tables of a model, grown on demand and kept once per device; not a module: it has no state to save."""

    def __init__(self, rotary_dims: int, base: float = 10000.0) -> None:
        self.rotary_dims = rotary_dims
        self.base = base
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._frequencies: dict[torch.device, Tensor] = {}

    def at(self, num_tokens: int, positions: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions 0 .. num_tokens - 1 as [T, R / 2], or for `positions` [B, T] as [B, T, R / 2].

        Given positions are not looked up but computed: that needs no table of their unknown maximum, hence no
        synchronisation with a GPU, and costs no more for the few tokens of a decoding step.
        """
        # Tables born while generating must also serve training: inference tensors cannot be saved for backward.
        with torch.inference_mode(False), torch.no_grad():
            if positions is None:
                self.reserve(num_tokens, device)
                cos, sin = self._tables[device]
                return cos[:num_tokens], sin[:num_tokens]
            if device not in self._frequencies:
                self._frequencies[device] = rotary_frequencies(self.rotary_dims, self.base, device)
            angles = positions.unsqueeze(-1).float() * self._frequencies[device]
            return angles.cos(), angles.sin()

    def reserve(self, num_positions: int, device: torch.device) -> None:
        """Make the tables now for positions below `num_positions`, instead of growing them later."""
        known = self._tables.get(device)
        if known is None or known[0].shape[0] < num_positions:
            with torch.inference_mode(False), torch.no_grad():
                self._tables[device] = rotary_tables(num_positions, self.rotary_dims, self.base, device)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R dims of every query and key; the other dims pass unchanged.

    Shapes: q [B, N, T, D], k [B, G, T, D]; cos, sin [T, R / 2] or [B, T, R / 2]. The results keep dtype and strides.
    """
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula and derives its gradient.
        return _rotate_plainly(q, cos, sin), _rotate_plainly(k, cos, sin)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _Rotate(torch.autograd.Function):
    """Measured against concatenating halves: 0.8 of the time both ways, and nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_output, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = x.clone()
    first, second = x[..., :half], x[..., half : 2 * half]
    if x.dtype == cos.dtype:
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    else:
        # Half precision is rounded once, at the end.
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = second * cos + first * sin
    return out


def _rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in turned] + [rest], dim=-1)
