"""ALiBi, T5's buckets and sinusoids against transformers' and against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.ops.position_bias import alibi_bias, alibi_slopes, relative_positions, rpe_buckets, sinusoids


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 71])
def test_slopes_equal_transformers(num_heads: int) -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float64).view(num_heads, 2)[:, 1]
    torch.testing.assert_close(alibi_slopes(num_heads).double(), theirs, rtol=4e-3, atol=0)  # theirs pass through bf16
    if num_heads == 8:
        assert torch.equal(alibi_slopes(8), 0.5 ** torch.arange(1.0, 9.0))


def test_a_bias_depends_on_distance_alone() -> None:
    relative = relative_positions(torch.tensor([[4, 7]]), torch.arange(8)[None])
    assert relative.tolist() == [[[[key - query for key in range(8)] for query in (4, 7)]]]
    bias = alibi_bias(torch.tensor([0.5, 0.25]), relative)
    assert bias.shape == (1, 2, 2, 8)
    assert bias[0, 1, 1].tolist() == [0.25 * (key - 7) for key in range(8)]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (6, 9), (2, 2)])
def test_buckets_equal_t5s(num_buckets: int, max_distance: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-300, 4).view(1, -1)
    theirs = T5Attention._relative_position_bucket(
        relative, bidirectional=False, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(rpe_buckets(relative, num_buckets, max_distance), theirs)


@pytest.mark.parametrize("hidden_size", [6, 7])
def test_sinusoids_equal_their_formula(hidden_size: int) -> None:
    half = math.ceil(hidden_size / 2)
    got = sinusoids(torch.tensor([[0, 3, 50]]), hidden_size)
    for place, position in enumerate((0, 3, 50)):
        angles = [position / 10000 ** (2 * i / hidden_size) for i in range(half)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)][:hidden_size]
        assert got[0, place].tolist() == pytest.approx(expected, abs=1e-5)
