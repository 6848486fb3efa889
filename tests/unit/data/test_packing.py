"""Index arrays of packed samples: upstream's golden vector, and a token-by-token walk as oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.common.errors import DataError
from megatron.data.packing import build_packed_index, num_epochs_for


def test_golden_arrays() -> None:
    sizes = np.array([5, 3, 7, 4, 6], np.int32)
    epochs = num_epochs_for(25, 8, 6)
    index = build_packed_index(sizes, np.arange(5), 8, epochs, 1234)
    assert epochs == 2
    assert index.document_order.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3]
    assert index.document_order.dtype == np.int32
    assert index.sample_starts.tolist() == [[0, 0], [1, 1], [2, 2], [4, 1], [6, 0], [7, 2], [9, 2]]
    assert index.sample_starts.dtype == np.int32
    assert index.sample_order.tolist() == [5, 0, 3, 4, 2, 1]
    assert index.sample_order.dtype == np.uint32


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda s: sum(s) > 0),
    seq_length=st.integers(1, 9),
    num_samples=st.integers(1, 20),
)
def test_starts_equal_a_walk_over_the_tokens(sizes: list[int], seq_length: int, num_samples: int) -> None:
    epochs = num_epochs_for(sum(sizes), seq_length, num_samples)
    assert (epochs * sum(sizes) - 1) // seq_length >= num_samples
    assert epochs == 1 or ((epochs - 1) * sum(sizes) - 1) // seq_length < num_samples
    index = build_packed_index(np.array(sizes, np.int32), np.arange(len(sizes)), seq_length, epochs, 7)
    places = [(d, o) for d, document in enumerate(index.document_order) for o in range(sizes[document])]
    walked = places[::seq_length][: len(index.sample_starts)]
    assert index.sample_starts[1:].tolist() == [list(place) for place in walked[1:]]
    assert index.sample_starts[0].tolist() == [0, 0]
    assert sorted(index.sample_order.tolist()) == list(range((len(places) - 1) // seq_length))


def test_only_the_given_documents_take_part() -> None:
    index = build_packed_index(np.full(10, 4, np.int32), np.arange(3, 6), 5, 2, 0)
    assert sorted(index.document_order.tolist()) == [3, 3, 4, 4, 5, 5]


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="8 tokens do not fill one sample of seq_length = 8"):
        build_packed_index(np.array([8], np.int32), np.arange(1), 8, 1, 0)
    assert len(build_packed_index(np.array([9], np.int32), np.arange(1), 8, 1, 0).sample_order) == 1
