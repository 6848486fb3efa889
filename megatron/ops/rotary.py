"""Rotary positions (Su et al. 2021, arXiv 2104.09864, equation 34), pairs as halves (GPT-NeoX) or neighbours (GPT-J).

The tables are fp32 in every precision: half-precision tables move the logits away from other implementations. This
module knows no cache and no layout. Invariant: the backward pass is the adjoint of the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Stretch = Callable[[Tensor], Tensor]


def rotary_frequencies(rotary_dims: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """`base^(-2i / rotary_dims)`, fp32 [rotary_dims / 2].

    Source: computed in fp32 in the order that transformers' GPTNeoX uses, so that both have the same bits.
    """
    exponents = torch.arange(0, rotary_dims, 2, dtype=torch.int64, device=device).float() / rotary_dims
    return 1.0 / (base**exponents)


def stretch_linearly(frequencies: Tensor, factor: float) -> Tensor:
    """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""
    return frequencies / factor


def stretch_by_wavelength(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> Tensor:
    """Llama 3.1's rule: waves shorter than original / high stay, longer than original / low are divided by `factor`,
    those between go over smoothly."""
    turns = original_positions * frequencies / (2 * math.pi)  # over the original length
    ramp = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * ((1 - ramp) / factor + ramp)


def stretch_by_parts(
    frequencies: Tensor, factor: float, beta_fast: float, beta_slow: float, base: float, original_positions: int
) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): dimensions that turn more than beta_fast times stay, fewer than beta_slow
    times are divided by `factor`. The ramp runs over whole dimensions, as in transformers."""
    half = frequencies.shape[0]

    def dimension(turns: float) -> float:
        return half * math.log(original_positions / (turns * 2 * math.pi)) / math.log(base)

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), 2 * half - 1)
    steps = torch.arange(half, dtype=torch.float32, device=frequencies.device)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def rotary_tables(
    num_positions: int,
    rotary_dims: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    stretch: Stretch | None = None,
    amplitude: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, fp32 [num_positions, rotary_dims / 2] each."""
    frequencies = rotary_frequencies(rotary_dims, base, device)
    if stretch is not None:
        frequencies = stretch(frequencies)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    return _tables(angles, amplitude)


def _tables(angles: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if amplitude == 1.0 else (cos * amplitude, sin * amplitude)


class RotaryTable:
    """The tables of a model, grown on demand and kept once per device; not a module: it has no state to save.

    stretch: changes the frequencies (one of the functions above). amplitude: multiplies both tables (YaRN).
    """

    def __init__(
        self,
        rotary_dims: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        stretch: Stretch | None = None,
        amplitude: float = 1.0,
    ) -> None:
        self.rotary_dims = rotary_dims
        self.base = base
        self.interleaved = interleaved
        self.stretch = stretch
        self.amplitude = amplitude
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
                frequencies = rotary_frequencies(self.rotary_dims, self.base, device)
                self._frequencies[device] = frequencies if self.stretch is None else self.stretch(frequencies)
            return _tables(positions.unsqueeze(-1).float() * self._frequencies[device], self.amplitude)

    def reserve(self, num_positions: int, device: torch.device) -> None:
        """Make the tables now for positions below `num_positions`, instead of growing them later."""
        known = self._tables.get(device)
        if known is None or known[0].shape[0] < num_positions:
            with torch.inference_mode(False), torch.no_grad():
                self._tables[device] = rotary_tables(
                    num_positions, self.rotary_dims, self.base, device, self.stretch, self.amplitude
                )


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate the first R dims of every query and key; the other dims pass unchanged.

    Shapes: q [B, N, T, D], k [B, G, T, D]; cos, sin [T, R / 2] or [B, T, R / 2]. The results keep dtype and strides.
    """
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula and derives its gradient.
        return _rotate_plainly(q, cos, sin, interleaved), _rotate_plainly(k, cos, sin, interleaved)
    return _Rotate.apply(q, cos, sin, interleaved), _Rotate.apply(k, cos, sin, interleaved)


class _Rotate(torch.autograd.Function):
    """Measured against concatenating halves: 0.8 of the time both ways, and nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_output, cos, -sin, ctx.interleaved), None, None, None


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second member of every pair."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = x.clone()
    first, second = _pairs(x, cos.shape[-1], interleaved)
    out_first, out_second = _pairs(out, cos.shape[-1], interleaved)
    if x.dtype == cos.dtype:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    else:
        # Half precision is rounded once, at the end.
        out_first.copy_(first * cos - second * sin)
        out_second.copy_(second * cos + first * sin)
    return out


def _rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    first, second = _pairs(x, half, interleaved)
    turned = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    whole = [torch.stack(turned, -1).flatten(-2)] if interleaved else turned
    return torch.cat([*whole, x[..., 2 * half :]], dim=-1)
