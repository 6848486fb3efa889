"""Turns of blended data sets: the vectorised builder against the plain greedy loop, and the bound on draws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.common.errors import DataError
from megatron.data import blending
from megatron.data.blending import blend_turns, build_blend, normalise_weights


def greedy(weights: list[float], num_samples: int) -> tuple[list[int], list[int]]:
    """The rule as written: at step t, the largest weight * max(t, 1) - count; the first one wins ties."""
    counts = [0] * len(weights)
    turns, inner = [], []
    for step in range(num_samples):
        errors = [w * max(step, 1) - c for w, c in zip(weights, counts, strict=True)]
        chosen = errors.index(max(errors))
        turns.append(chosen)
        inner.append(counts[chosen])
        counts[chosen] += 1
    return turns, inner


WEIGHTS = st.lists(st.sampled_from([0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0, 3.0]), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(0, 900))
def test_pieces_equal_the_greedy_loop(weights: list[float], num_samples: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blending, "_PIECE_STEPS", 37)  # many pieces from few steps
        blend = build_blend(weights, num_samples)
    turns, inner = greedy(normalise_weights(weights).tolist(), num_samples)
    assert blend.dataset_ids.tolist() == turns
    assert blend.sample_ids.tolist() == inner
    assert blend.counts.tolist() == np.bincount(turns, minlength=len(weights)).tolist()


def test_full_size_pieces_equal_the_greedy_loop() -> None:
    weights = normalise_weights([0.001, 0.999, 0.2, 0.05])
    assert blend_turns(weights, 30_000).tolist() == greedy(weights.tolist(), 30_000)[0]


def test_wrong_guesses_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = normalise_weights([1.0, 2.0, 4.0, 8.0])
    expected = blend_turns(weights, 2000)
    monkeypatch.setattr(blending, "_PIECE_STEPS", 100)

    def all_to_the_first(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
        counts = np.zeros((len(steps), len(weights)), np.int64)
        counts[:, 0] = steps
        return counts

    monkeypatch.setattr(blending, "_likely_counts", all_to_the_first)
    assert blend_turns(weights, 2000).tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.integers(1, 3000))
def test_no_dataset_is_drawn_beyond_its_share(weights: list[float], num_samples: int) -> None:
    shares = normalise_weights(weights)
    for share, count in zip(shares, build_blend(weights, num_samples).counts, strict=True):
        assert count <= math.floor(share * (num_samples - 1) + 1 + 1e-9)


def test_a_longer_blend_begins_with_the_shorter_one() -> None:
    weights = normalise_weights([0.2, 0.5, 0.3])
    assert blend_turns(weights, 40_000)[:17_001].tolist() == blend_turns(weights, 17_001).tolist()


def test_weight_zero_takes_no_turn() -> None:
    assert build_blend([0.0, 1.0, 0.0, 1.0], 50).counts.tolist() == [0, 25, 0, 25]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.1], [float("nan")], [1.0] * 255])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError):
        normalise_weights(weights)
