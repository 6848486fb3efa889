"""Rotary positions against complex multiplication and against transformers' GPTNeoX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.model.attention import rotary_table
from megatron.model.spec import ModelSpec, RopeScaling
from megatron.ops.rotary import RotaryTable, apply_rotary, rotary_tables


def rotate_exactly(x: Tensor, rotary_dims: int, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Dims i and i + R/2 as one complex number, turned by position / base^(2i/R), in float64. positions [B, T]."""
    half = rotary_dims // 2
    x = x.double()
    angles = positions[:, None, :, None].double() * base ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:rotary_dims]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., rotary_dims:]], -1)


@pytest.mark.parametrize(("D", "rotary_dims"), [(8, 8), (32, 8), (6, 2), (24, 12)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
def test_equals_complex_rotation(D: int, rotary_dims: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k = torch.randn(2, 6, 11, D).to(dtype).clamp(-2, 2), torch.randn(2, 3, 11, D).to(dtype).clamp(-2, 2)
    cos, sin = rotary_tables(11, rotary_dims)
    assert cos.dtype == sin.dtype == torch.float32
    positions = torch.arange(11).expand(2, 11)
    # A result below 4 is rounded once: half of the last place, 2^-7 in bf16 with room for a sum of two.
    for x, rotated in zip((q, k), apply_rotary(q, k, cos, sin), strict=True):
        assert rotated.dtype == dtype
        assert float((rotated.double() - rotate_exactly(x, rotary_dims, positions)).abs().max()) <= 2 * tolerance
        assert torch.equal(rotated[..., rotary_dims:], x[..., rotary_dims:])


def test_inputs_are_not_changed_and_may_be_views() -> None:
    qkv = torch.randn(2, 7, 4, 3, 8)
    before = qkv.clone()
    q, k = qkv[..., 0, :].transpose(1, 2), qkv[..., 1, :].transpose(1, 2)
    cos, sin = rotary_tables(7, 4)
    from_views = apply_rotary(q, k, cos, sin)
    from_copies = apply_rotary(q.contiguous(), k.contiguous(), cos, sin)
    assert torch.equal(qkv, before)
    assert all(torch.equal(a, b) for a, b in zip(from_views, from_copies, strict=True))


def test_given_positions_equal_their_table_rows() -> None:
    table = RotaryTable(4, base=700.0)
    device = torch.device("cpu")
    positions = torch.tensor([[5, 6], [0, 1999]])
    cos, sin = table.at(2, positions, device)
    all_cos, all_sin = table.at(2000, None, device)
    assert torch.equal(cos, all_cos[positions])
    assert torch.equal(sin, all_sin[positions])
    x = torch.randn(2, 3, 2, 8)
    rotated, _ = apply_rotary(x, x, cos, sin)
    assert float((rotated.double() - rotate_exactly(x, 4, positions, 700.0)).abs().max()) < 1e-3  # fp32 angle of 1999


def test_table_grows_and_keeps_its_values() -> None:
    table = RotaryTable(8, base=500.0)
    device = torch.device("cpu")
    short, _ = table.at(5, None, device)
    long, _ = table.at(50, None, device)
    assert short.shape == (5, 4)
    assert torch.equal(long[:5], short)
    assert torch.equal(long, rotary_tables(50, 8, 500.0)[0])


def test_a_table_born_in_inference_mode_serves_training() -> None:
    table = RotaryTable(4)
    with torch.inference_mode():
        table.at(6, None, torch.device("cpu"))
    x = torch.randn(1, 1, 6, 4, requires_grad=True)
    apply_rotary(x, x, *table.at(6, None, torch.device("cpu")))[0].sum().backward()
    assert x.grad is not None


def test_gradient_is_exact() -> None:
    cos, sin = (t.double() for t in rotary_tables(5, 4))
    q = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: apply_rotary(q, k, cos, sin), (q, k))


def test_equals_transformers() -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    configuration = pytest.importorskip("transformers").GPTNeoXConfig(
        hidden_size=64, num_attention_heads=2, rotary_pct=0.25, max_position_embeddings=2048
    )
    x = torch.randn(2, 2, 2048, 32)
    their_cos, their_sin = neox.GPTNeoXRotaryEmbedding(configuration)(x, torch.arange(2048)[None])
    cos, sin = rotary_tables(2048, 8)
    assert torch.equal(their_cos[0, :, :4], cos)
    assert torch.equal(their_sin[0, :, :4], sin)
    theirs, _ = neox.apply_rotary_pos_emb(x, x, their_cos, their_sin)
    ours, _ = apply_rotary(x, x, cos, sin)
    assert torch.allclose(ours, theirs, atol=1e-6)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0, "beta_slow": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("rotary_dims", [32, 6])
def test_stretched_frequencies_equal_transformers(kind: str, rotary_dims: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = SCALINGS[kind]
    theirs = LlamaConfig(
        hidden_size=rotary_dims, num_attention_heads=1, max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **values},
    )  # fmt: skip
    expected, amplitude = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    spec = ModelSpec(
        1, rotary_dims, 1, 1, 4, 8, 8, 256, rotary_dims=rotary_dims, rotary_base=500.0,
        rope_scaling=RopeScaling(
            kind, values["factor"], values.get("original_max_position_embeddings", 0), 1.0, 4.0,  # type: ignore[arg-type]
            values.get("beta_fast", 32.0), values.get("beta_slow", 1.0),
        ),
    )  # fmt: skip
    table = rotary_table(spec)
    assert table is not None
    cos, sin = table.at(2, torch.tensor([[1, 200]]), torch.device("cpu"))
    torch.testing.assert_close(cos[0, 0], expected.cos() * amplitude, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0, 1], (200 * expected).sin() * amplitude, atol=1e-4, rtol=0)
    rows = table.at(201, None, torch.device("cpu"))
    assert torch.equal(rows[0][200], cos[0, 1])


@pytest.mark.parametrize(("D", "rotary_dims"), [(8, 8), (12, 4)])
def test_interleaved_pairs_equal_halves_of_permuted_dimensions(D: int, rotary_dims: int) -> None:
    x, k = torch.randn(2, 3, 9, D, requires_grad=True), torch.randn(2, 1, 9, D)
    cos, sin = rotary_tables(9, rotary_dims)
    order = [*range(0, rotary_dims, 2), *range(1, rotary_dims, 2), *range(rotary_dims, D)]
    turned, _ = apply_rotary(x, k, cos, sin, interleaved=True)
    expected, _ = apply_rotary(x[..., order], k, cos, sin)
    assert torch.equal(turned[..., order], expected)
    weights = torch.randn(2, 3, 9, D)
    (mine,) = torch.autograd.grad((turned * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights[..., order]).sum(), x)
    torch.testing.assert_close(mine, theirs)
