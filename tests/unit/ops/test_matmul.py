"""Linear layers by either library against float64, and the rule that chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.ops import matmul
from megatron.ops.matmul import linear, prefers_onednn


@pytest.fixture(params=["default", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with each library, whatever this processor would choose."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: request.param == "oneDNN")
    return str(request.param)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 7, 33), (0, 5), (4, 1, 64)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_and_its_gradients(library: str, shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=dtype), torch.randn(6, shape[-1], dtype=dtype)]
    inputs += [torch.randn(6, dtype=dtype)] if has_bias else []
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn(*shape[:-1], 6, dtype=dtype)
    out = linear(*inputs)
    out.backward(upstream)
    expected = exact[0] @ exact[1].t() + (exact[2] if has_bias else 0)
    expected.backward(upstream.double())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-6}[dtype]
    assert out.dtype == dtype
    assert torch.allclose(out.detach().double(), expected.detach(), rtol=tolerance, atol=4 * tolerance)
    for got, true in zip(inputs, exact, strict=True):
        assert got.grad is not None
        assert true.grad is not None
        assert torch.allclose(got.grad.double(), true.grad, rtol=tolerance, atol=8 * tolerance)


def test_only_wanted_gradients_are_made(library: str) -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True), torch.randn(4)
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x.sum(0).expand(4, 5), atol=1e-5)


def test_views_are_read_through_their_strides(library: str) -> None:
    x, weight = torch.randn(5, 8).t(), torch.randn(12, 10)[::2, ::2]
    assert torch.allclose(linear(x, weight), x.contiguous() @ weight.contiguous().t(), atol=1e-5)


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
        (None, "DEFAULT", False),
    ],
)
def test_the_choice_follows_the_processor(
    vendor: str | None, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    information = tmp_path / "cpuinfo"
    information.write_text("processor\t: 0\n" + (f"vendor_id\t: {vendor}\n" if vendor else "") + "model\t\t: 1\n")
    monkeypatch.setattr(matmul, "Path", lambda name: information)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert prefers_onednn.__wrapped__() is expected


def test_an_operator_with_other_arguments_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*_: object) -> torch.Tensor:
        raise RuntimeError("unknown arguments")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(matmul, "_processor_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(matmul, "multiply_transposed", changed)
    assert prefers_onednn.__wrapped__() is False
