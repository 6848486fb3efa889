"""Norms and activations against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.common.errors import ConfigError
from megatron.model.spec import GATED_ACTIVATIONS
from megatron.ops.activations import GATED, PLAIN, activation_function
from megatron.ops.norms import layer_norm, rms_norm, scale_norm

# Half: one rounding of a result below 16, 2^-8 (bf16) or 2^-11 (fp16) relative.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 128, 1000])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_norms_equal_their_formulas(dtype: torch.dtype, hidden: int, eps: float) -> None:
    torch.manual_seed(hidden)
    # An offset of 30 spreads half-precision statistics visibly if they are not taken in fp32.
    x = (torch.randn(3, 5, hidden) + 30).to(dtype)
    weight, bias = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()
    got = layer_norm(x, weight, bias, eps)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    expected = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    got = rms_norm(x, weight, eps)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scale_norm_gives_every_vector_one_length(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 33).to(dtype)
    x[2] = 0
    length = torch.tensor([7.5]).to(dtype)
    got = scale_norm(x, length, 1e-8)
    assert got.dtype == dtype
    expected = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-8) * 7.5
    assert torch.allclose(got.double(), expected, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert (got[2] == 0).all()


def test_norms_without_parameters_have_unit_scale() -> None:
    x = torch.randn(4, 64, dtype=torch.float64) * 5
    assert torch.allclose(layer_norm(x, None, None, 0.0).square().mean(-1), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(rms_norm(x, None, 0.0).square().mean(-1), torch.ones(4, dtype=torch.float64))


def _phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


FORMULAS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * _phi(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "softsign": lambda x: x / (1 + abs(x)),
    "geglu": lambda x: x * _phi(x),
    "geglu_tanh": lambda x: 0.5 * x * (1 + math.tanh(0.79788456 * (x + 0.044715 * x**3))),
    "reglu": lambda x: max(x, 0.0),
    "swiglu": lambda x: x * _sigmoid(x),
    "bilinear": lambda x: x,
    "glu": _sigmoid,
}


def test_every_name_has_a_formula_here() -> None:
    assert set(FORMULAS) == {*PLAIN, *GATED}
    assert set(GATED) == GATED_ACTIVATIONS


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_equal_their_formulas(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](float(value)) for value in x], dtype=torch.float64)
    function: Callable[..., Tensor] = activation_function(name)
    if name in GATED:
        up = torch.randn(101, dtype=torch.float64)
        assert torch.allclose(function(x, up), expected * up, atol=1e-7)
    else:
        assert torch.allclose(function(x), expected, atol=1e-7)  # the tanh constants have 8 digits


def test_an_unknown_activation_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'gelo' is not known\. Use one of: bilinear, geglu"):
        activation_function("gelo")
