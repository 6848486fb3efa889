"""Every tensor-parallel collective and its adjoint, against plain arithmetic on whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.collective_cases import apply

Ranks = Callable[..., list[Any]]
TP = 2
B, T, H = 3, 4, 5


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(TP)]


def _cut(whole: torch.Tensor, rank: int) -> torch.Tensor:
    return whole.chunk(TP, dim=1)[rank]


# name, sequence parallel, shape of a rank's input, of its output, forward and backward by (all ranks' tensors, rank)
CASES = {
    "enter": ("enter_region", False, T, T, lambda x, r: x[r], lambda g, r: g[0] + g[1]),
    "leave": ("leave_region", False, T, T, lambda x, r: x[0] + x[1], lambda g, r: g[r]),
    "enter-sp": ("enter_region", True, T // TP, T, lambda x, r: torch.cat(x, 1), lambda g, r: _cut(g[0] + g[1], r)),
    "leave-sp": ("leave_region", True, T, T // TP, lambda x, r: _cut(x[0] + x[1], r), lambda g, r: torch.cat(g, 1)),
    "gather": ("gather_sequence", True, T // TP, T, lambda x, r: torch.cat(x, 1), lambda g, r: _cut(g[r], r)),
    "split": ("split_sequence", True, T, T // TP, lambda x, r: _cut(x[r], r), lambda g, r: torch.cat(g, 1)),
    "shared": ("shared_parameter", True, T, T, lambda x, r: x[r], lambda g, r: g[0] + g[1]),
    "shared-without-sp": ("shared_parameter", False, T, T, lambda x, r: x[r], lambda g, r: g[r]),
    "gather-without-sp": ("gather_sequence", False, T, T, lambda x, r: x[r], lambda g, r: g[r]),
    "summed": ("summed_gradient", False, T, T, lambda x, r: x[r], lambda g, r: g[0] + g[1]),
}


@pytest.mark.parametrize("case", CASES)
def test_collective_and_adjoint(ranks: Ranks, case: str) -> None:
    name, is_sequence_parallel, tokens_in, tokens_out, forward, backward = CASES[case]
    parts, gradients = _random(B, tokens_in, H, seed=1), _random(B, tokens_out, H, seed=2)
    results = ranks(apply, TP, name, parts, gradients, {"sequence_parallel": is_sequence_parallel})
    for rank, (result, gradient) in enumerate(results):
        torch.testing.assert_close(result, forward(parts, rank), rtol=0, atol=0)
        torch.testing.assert_close(gradient, backward(gradients, rank), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "is_sequence_parallel"), [("leave_region", False), ("leave_region", True)])
def test_sums_in_fp32_round_once(ranks: Ranks, name: str, is_sequence_parallel: bool) -> None:
    """fp32_allreduce: the sum of four bf16 numbers is that of their exact values, rounded at the end."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(B, 8, H, generator=generator).bfloat16() for _ in range(4)]
    options = {"sequence_parallel": is_sequence_parallel, "sums_in_fp32": True}
    out = [torch.zeros(B, 8 // (4 if is_sequence_parallel else 1), H).bfloat16()] * 4
    exact = sum(part.float() for part in parts).bfloat16()
    for rank, (result, _) in enumerate(ranks(apply, 4, name, parts, out, options)):
        expected = exact.chunk(4, dim=1)[rank] if is_sequence_parallel else exact
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
