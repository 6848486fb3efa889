"""Matrix products, by the library that is fast on this processor.

On a CPU torch multiplies fp32 matrices with MKL, which uses AVX-512 on Intel processors only; oneDNN, which torch has
too, uses it on all. On an AMD Zen 5 core that is 220 GFLOP/s instead of 97. Everything else goes torch's usual way.
Invariant: the choice depends on processor, torch and dtype alone, never on a timing, so that a rerun has the same bits.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, with gradients. Shapes: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    # A compiler knows torch's own product and chooses its library itself.
    if torch.compiler.is_compiling() or not uses_onednn(x) or x.numel() == 0:
        return F.linear(x, weight, bias)
    result: Tensor = _OneDnnLinear.apply(x, weight, bias)
    return result


def uses_onednn(tensor: Tensor) -> bool:
    """Whether products of this tensor go to `multiply_transposed` instead of torch's own functions."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and prefers_onednn()


def multiply_transposed(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` by oneDNN. Shapes: a [..., K], b [N, K] -> [..., N]; both may be transposed views."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


@cache
def prefers_onednn() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and this torch has oneDNN's linear operator."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    vendor = _processor_vendor()
    if vendor in ("", "GenuineIntel"):
        return False
    try:
        probe = multiply_transposed(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
    except (RuntimeError, TypeError):  # an internal operator of torch: its arguments may change
        return False
    if not bool((probe == 4.0).all()):
        return False
    logger.info("matmul: oneDNN for fp32 on the CPU (%s with AVX-512, on which MKL does without it)", vendor)
    return True


def _processor_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        # A frozen weight has no gradient that would ask for the input: fine-tuning keeps that much less.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return multiply_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_x = multiply_transposed(grad_output, weight.t()) if needs_x else None
        grad_weight = multiply_transposed(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None
