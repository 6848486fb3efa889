"""Packed and blended samples against a walk over the shuffled documents."""

from pathlib import Path

import numpy as np
import pytest

from megatron.common.errors import DataError
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.token_dataset import BlendedDataset, PackedDataset, open_labels
from tests.unit.data.builders import make_pair

SIZES = [5, 3, 7, 0, 4, 6, 1, 30]


def packed(prefix: Path, sizes: list[int] | None = None, **options: object) -> PackedDataset:
    values: dict[str, object] = {"name": "train", "seq_length": 8, "seed": 1234, "num_samples": 20}
    return PackedDataset(make_pair(prefix, sizes or SIZES), **{**values, **options})  # type: ignore[arg-type]


def test_samples_equal_a_walk(tmp_path: Path) -> None:
    dataset = packed(tmp_path / "a")
    stream = [t for d in dataset.document_order for t in dataset.indexed[int(d)].tolist()]
    for index in range(len(dataset)):
        start = int(dataset.sample_order[index]) * 8
        assert dataset.sample(index).tokens.tolist() == stream[start : start + 9]


def test_every_sample_of_the_epochs_is_used(tmp_path: Path) -> None:
    dataset = packed(tmp_path / "a", num_samples=None, num_epochs=3)
    assert len(dataset) == (3 * sum(SIZES) - 1) // 8
    firsts = sorted(int(dataset.sample_order[i]) for i in range(len(dataset)))
    assert firsts == list(range(len(dataset)))


def test_sample_names_its_documents(tmp_path: Path) -> None:
    dataset = packed(tmp_path / "a")
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        from_documents = np.concatenate([dataset.indexed[d] for d in sample.documents]).tolist()
        assert set(sample.tokens.tolist()) <= set(from_documents)


def test_documents_outside_the_range_never_appear(tmp_path: Path) -> None:
    dataset = packed(tmp_path / "a", documents=(1, 3))
    allowed = {*dataset.indexed[1].tolist(), *dataset.indexed[2].tolist()}
    assert {t for i in range(len(dataset)) for t in dataset.sample(i).tokens.tolist()} == allowed


def test_labels_run_in_parallel(tmp_path: Path) -> None:
    tokens = make_pair(tmp_path / "t", SIZES)
    with IndexedWriter(tmp_path / "l", "i4") as writer:
        writer.add_documents(np.where(tokens.tokens % 3 == 0, -100, tokens.tokens.astype(int)), tokens.sizes)
    labels = open_labels(tmp_path / "l", tokens)
    dataset = PackedDataset(tokens, name="train", seq_length=8, seed=3, num_samples=9, labels=labels)
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        assert sample.labels is not None
        assert sample.labels.tolist() == [-100 if t % 3 == 0 else t for t in sample.tokens.tolist()]


def test_labels_of_other_sizes_or_types_are_refused(tmp_path: Path) -> None:
    tokens = make_pair(tmp_path / "t", [3, 4])
    make_pair(tmp_path / "other", [4, 3], "i4")
    make_pair(tmp_path / "unsigned", [3, 4], "u2")
    with pytest.raises(DataError, match="does not run in parallel"):
        open_labels(tmp_path / "other", tokens)
    with pytest.raises(DataError, match="cannot hold -100"):
        open_labels(tmp_path / "unsigned", tokens)


def test_the_fingerprint_sees_everything_that_moves_samples(tmp_path: Path) -> None:
    variants = [
        packed(tmp_path / "a"),
        packed(tmp_path / "a", seed=1),
        packed(tmp_path / "a", seq_length=7),
        packed(tmp_path / "a", documents=(0, 5)),
        packed(tmp_path / "a", num_samples=200),
        packed(tmp_path / "b", sizes=[5, 3, 7, 0, 4, 6, 2, 29]),
    ]
    assert len({dataset.fingerprint for dataset in variants}) == len(variants)
    assert packed(tmp_path / "a").fingerprint == variants[0].fingerprint


def test_data_written_anew_is_not_read_through_an_old_index(tmp_path: Path) -> None:
    before = packed(tmp_path / "a", sizes=[20, 20])
    after = packed(tmp_path / "a", sizes=[10, 30])
    fresh = packed(tmp_path / "b", sizes=[10, 30])
    assert [after.sample(i).tokens.tolist() for i in range(20)] == [fresh.sample(i).tokens.tolist() for i in range(20)]
    assert before.fingerprint != after.fingerprint


def test_an_empty_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no token"):
        packed(tmp_path / "a", documents=(3, 4))


def test_blend_follows_its_turns(tmp_path: Path) -> None:
    parts = [packed(tmp_path / "a"), packed(tmp_path / "b", sizes=[40, 50, 60])]
    blend = BlendedDataset(parts, [1.0, 3.0], 12)
    assert len(blend) == 12
    seen = [0, 0]
    for index in range(12):
        owner = int(blend.dataset_ids[index])
        assert blend.sample(index).tokens.tolist() == parts[owner].sample(seen[owner]).tokens.tolist()
        seen[owner] += 1
    assert seen == [3, 9]


def test_a_blend_that_would_overdraw_is_refused_before_the_first_sample(tmp_path: Path) -> None:
    small, large = packed(tmp_path / "a", sizes=[10], num_samples=1), packed(tmp_path / "b", num_samples=1000)
    with pytest.raises(DataError, match="data set 0 of the blend has 1 samples, its weight calls for 500"):
        BlendedDataset([small, large], [0.5, 0.5], 1000)
