"""Batches: upstream's assignment to ranks, and an order that no layout, restart or thread can change."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.common.errors import DataError
from megatron.data.document_dataset import DocumentDataset
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.loader import BatchLoader
from megatron.data.token_dataset import PackedDataset, open_labels
from tests.unit.data.builders import make_pair


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    rng = np.random.default_rng(1)
    indexed = make_pair(tmp_path / "a", rng.integers(1, 40, 60).tolist())
    return PackedDataset(indexed, name="train", seq_length=16, seed=11, num_epochs=1)


def ids_of_step(dataset: PackedDataset, dp_size: int, micro: int, num_micro: int, consumed: int) -> list[int]:
    """Sample ids of the global batch in its order, from all ranks together."""
    ranks = [BatchLoader(dataset, micro, num_micro, rank, dp_size).step_batches(consumed) for rank in range(dp_size)]
    return [i for m in range(num_micro) for rank in range(dp_size) for i in ranks[rank][m].sample_ids]


@pytest.mark.parametrize(
    ("dp_size", "micro", "num_micro"), [(1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 3, 1), (6, 1, 2)]
)
def test_the_order_does_not_depend_on_the_layout(
    dataset: PackedDataset, dp_size: int, micro: int, num_micro: int
) -> None:
    for consumed in (0, 12, 24, 36, 5):
        expected = [(consumed + k) % len(dataset) for k in range(12)]
        assert ids_of_step(dataset, dp_size, micro, num_micro, consumed) == expected


def test_batches_hold_the_samples_shifted_by_one(dataset: PackedDataset) -> None:
    for batch in BatchLoader(dataset, 2, 3, 1, 2).step_batches(24):
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (2, 16)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.float32
        assert bool((batch.loss_mask == 1).all())
        for row, index in enumerate(batch.sample_ids):
            sample = dataset.sample(index).tokens
            assert batch.tokens[row].tolist() == sample[:-1].tolist()
            assert batch.labels[row].tolist() == sample[1:].tolist()


def test_writing_into_labels_leaves_tokens_alone(dataset: PackedDataset) -> None:
    batch = BatchLoader(dataset, 1, 1, 0, 1).step_batches(0)[0]
    before = batch.tokens.clone()
    batch.labels.fill_(-1)
    assert torch.equal(batch.tokens, before)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_is_invisible(dataset: PackedDataset, workers: int) -> None:
    plain, ahead = BatchLoader(dataset, 2, 2, 0, 2), BatchLoader(dataset, 2, 2, 0, 2, num_workers=workers)
    # Forwards, the same step again, a jump ahead, backwards, and over the end of the data.
    for consumed in (0, 8, 16, 16, 48, 56, 8, 16, len(dataset) - 3, 10 * len(dataset) + 1):
        for one, other in zip(plain.step_batches(consumed), ahead.step_batches(consumed), strict=True):
            assert one.sample_ids == other.sample_ids
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.labels, other.labels)
    ahead.close()


def test_a_restart_at_any_step_sees_the_same_stream(dataset: PackedDataset) -> None:
    def stream(first: int, steps: int) -> list[list[int]]:
        iterator = BatchLoader(dataset, 3, 2, 0, 1, num_workers=2).iterate(first * 6)
        return [[i for batch in next(iterator) for i in batch.sample_ids] for _ in range(steps)]

    whole = stream(0, 12)
    for killed_at in range(12):
        assert stream(killed_at, 12 - killed_at) == whole[killed_at:]


def test_behind_the_last_sample_comes_the_first(dataset: PackedDataset) -> None:
    loader, length = BatchLoader(dataset, 4, 1, 0, 1), len(dataset)
    batch = loader.step_batches(length - 2)[0]
    assert batch.sample_ids == [length - 2, length - 1, 0, 1]
    assert batch.tokens[2].tolist() == dataset.sample(0).tokens[:-1].tolist()
    assert loader.epoch(length // 2) == pytest.approx(0.5, abs=0.05)


def test_end_of_document_inputs_carry_no_loss(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", "u2") as writer:
        writer.add_documents(np.array([5, 6, 0, 7, 0, 8, 9, 0, 5], "u2"), np.array([3, 2, 4]))
    from megatron.data.indexed import IndexedDataset

    dataset = PackedDataset(IndexedDataset(tmp_path / "a"), name="train", seq_length=8, seed=0, num_epochs=1)
    batch = BatchLoader(dataset, 1, 1, 0, 1, eod_mask_loss=True, eod_id=0).step_batches(0)[0]
    assert batch.loss_mask.tolist() == [[0.0 if token == 0 else 1.0 for token in batch.tokens[0].tolist()]]
    assert 0.0 in batch.loss_mask
    assert 0 in batch.labels, "predicting the end of a document is learnt"
    with pytest.raises(ValueError, match="eod_mask_loss"):
        BatchLoader(dataset, 1, 1, 0, 1, eod_mask_loss=True)


def test_ignored_labels_are_masked_and_valid(tmp_path: Path) -> None:
    tokens = make_pair(tmp_path / "t", [9, 9])
    values = np.where(tokens.tokens % 2 == 0, -100, tokens.tokens.astype(int) + 50)
    with IndexedWriter(tmp_path / "l", "i4") as writer:
        writer.add_documents(values, tokens.sizes)
    labels = open_labels(tmp_path / "l", tokens)
    dataset = PackedDataset(tokens, name="t", seq_length=8, seed=0, num_epochs=1, labels=labels)
    batch = BatchLoader(dataset, 2, 1, 0, 1).step_batches(0)[0]
    following = [dataset.sample(i).tokens[1:] for i in batch.sample_ids]
    assert batch.loss_mask.tolist() == [[float(t % 2) for t in row] for row in following]
    assert batch.labels.tolist() == [[t + 50 if t % 2 else 0 for t in row] for row in following]


def test_padding_carries_no_loss(tmp_path: Path) -> None:
    indexed = make_pair(tmp_path / "a", [3, 5])
    dataset = DocumentDataset(indexed, name="t", seq_length=6, seed=0, packing="unpacked", num_epochs=1)
    batch = BatchLoader(dataset, 2, 1, 0, 1).step_batches(0)[0]
    assert sorted(batch.loss_mask.sum(dim=1).tolist()) == [2.0, 4.0]


def test_tokens_beyond_the_vocabulary_are_refused(dataset: PackedDataset) -> None:
    highest = int(dataset.indexed.tokens.max())
    BatchLoader(dataset, 4, 20, 0, 1, vocab_size=highest + 1).step_batches(0)
    with pytest.raises(DataError, match=rf"vocabulary has {highest // 2} entries"):
        BatchLoader(dataset, 4, 20, 0, 1, vocab_size=highest // 2).step_batches(0)


def test_errors_of_the_reading_thread_arrive(dataset: PackedDataset) -> None:
    loader = BatchLoader(dataset, 4, 20, 0, 1, vocab_size=2, num_workers=1)
    with pytest.raises(DataError):
        loader.step_batches(0)
    loader.close()
