"""Split boundaries, sample counts and weights: upstream's executed values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.common.errors import DataError
from megatron.data.splits import document_weights, samples_needed, split_boundaries


@pytest.mark.parametrize(
    ("split", "documents", "expected"),
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]),
        ("995,4,1", 1000, [0, 995, 999, 1000]),
        ("949,50,1", 100, [0, 95, 100, 100]),
        ("969, 30, 1", 10, [0, 10, 10, 10]),
        ("90/5/5", 20, [0, 18, 19, 20]),
        ("1", 7, [0, 7, 7, 7]),
        ("3,1", 8, [0, 6, 8, 8]),
        ("0,1,1", 3, [0, 0, 1, 3]),
    ],
)
def test_boundaries(split: str, documents: int, expected: list[int]) -> None:
    assert split_boundaries(split, documents) == expected


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), st.integers(0, 5000))
def test_boundaries_cover_all_documents_in_order(shares: list[int], documents: int) -> None:
    boundaries = split_boundaries(",".join(map(str, shares)), documents)
    assert len(boundaries) == 4
    assert boundaries == sorted(boundaries)
    assert boundaries[0] == 0
    assert boundaries[-1] == documents


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2", "nan,1"])
def test_bad_splits_are_refused(split: str) -> None:
    with pytest.raises(DataError, match="split = "):
        split_boundaries(split, 10)


def test_samples_of_a_run() -> None:
    assert samples_needed(train_iters=100, train_batch_size=8, eval_interval=30, eval_iters=5) == (800, 160, 40)
    assert samples_needed(train_iters=100, train_batch_size=8, eval_interval=1000, eval_iters=0) == (800, 0, 0)


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, [0.5, 0.5]), (0.3, [0.823, 0.177])])
def test_weights_by_documents(alpha: float, expected: list[float]) -> None:
    assert document_weights([100, 900], alpha) == pytest.approx(expected, abs=5e-4)


def test_weight_of_a_single_dataset_is_one() -> None:
    assert document_weights([17], 0.5) == [1.0]
    assert document_weights([17, 0], 0.5) == [1.0, 0.0]
