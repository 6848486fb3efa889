"""Whole-document packing: nothing divided, nothing leaked from the next document, labels and padding."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.common.errors import DataError
from megatron.data.document_dataset import DocumentDataset, build_document_index
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.token_dataset import open_labels
from tests.unit.data.builders import make_pair

SIZES = [3, 2, 0, 4, 12, 1, 5, 8]


def dataset(prefix: Path, **options: object) -> DocumentDataset:
    values: dict[str, object] = {
        "name": "train", "seq_length": 7, "seed": 5, "packing": "pack_until_overflow", "num_samples": 6,
    }  # fmt: skip
    return DocumentDataset(make_pair(prefix, SIZES), **{**values, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
def test_samples_hold_whole_documents_and_padding(tmp_path: Path, packing: str) -> None:
    data = dataset(tmp_path / "a", packing=packing)
    assert len(data) >= 6
    for index in range(len(data)):
        sample = data.sample(index)
        expected = np.concatenate([data.indexed[d][:8] for d in sample.documents]).tolist()
        assert len(expected) <= 8
        assert packing != "unpacked" or len(sample.documents) == 1
        assert sample.tokens.tolist() == expected + [0] * (8 - len(expected))
        assert sample.labels is not None
        assert sample.labels.tolist() == expected + [-100] * (8 - len(expected))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=15), st.integers(1, 20), st.integers(1, 9))
def test_filling_equals_a_walk(sizes: list[int], num_samples: int, seq_length: int) -> None:
    order, starts, shuffled = build_document_index(
        np.array(sizes), np.arange(len(sizes)), seq_length, 3, "pack_until_overflow", num_samples, None
    )
    groups: list[list[int]] = [[]]
    room = seq_length + 1
    for document in order.tolist():
        length = min(sizes[document], seq_length + 1)
        if length > room:
            groups.append([])
            room = seq_length + 1
        groups[-1].append(document)
        room -= length
    assert [order[a:b].tolist() for a, b in itertools.pairwise(starts)] == groups
    assert sorted(shuffled.tolist()) == list(range(len(groups)))
    assert len(groups) >= num_samples


def test_long_documents_are_left_out_on_request(tmp_path: Path) -> None:
    data = dataset(tmp_path / "a", allow_chopped=False, packing="unpacked")
    assert 4 not in data.document_order
    assert 4 in dataset(tmp_path / "a", packing="unpacked").document_order


def test_the_range_of_documents_is_kept(tmp_path: Path) -> None:
    assert set(dataset(tmp_path / "a", documents=(3, 6)).document_order.tolist()) == {3, 4, 5}


def test_documents_without_a_label_are_left_out(tmp_path: Path) -> None:
    tokens = make_pair(tmp_path / "t", [3, 2, 4])
    with IndexedWriter(tmp_path / "l", "i4") as writer:
        writer.add_documents(np.array([-100, 2, 3, -100, -100, 6, -100, 8, -100]), tokens.sizes)
    labels = open_labels(tmp_path / "l", tokens)
    data = DocumentDataset(tokens, name="t", seq_length=4, seed=0, packing="unpacked", num_epochs=1, labels=labels)
    found = {tuple(s.documents): s.labels.tolist() for s in map(data.sample, range(len(data))) if s.labels is not None}
    assert found == {(0,): [-100, 2, 3, -100, -100], (2,): [6, -100, 8, -100, -100]}


def test_no_usable_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can be used"):
        dataset(tmp_path / "a", documents=(4, 5), allow_chopped=False)
