"""From paths, proportions and weights to the data sets of a run."""

import logging
from pathlib import Path

import numpy as np
import pytest

from megatron.common.errors import DataError
from megatron.data.assembly import SampleRules, blend_many, split_one
from megatron.data.token_dataset import BlendedDataset, PackedDataset, TokenDataset
from tests.unit.data.builders import make_pair

RULES = SampleRules(seq_length=8, seed=1234)


def tokens_of(dataset: TokenDataset) -> set[int]:
    return {int(t) for i in range(len(dataset)) for t in dataset.sample(i).tokens}


def test_parts_never_share_a_document(tmp_path: Path) -> None:
    make_pair(tmp_path / "a", [10] * 100)
    parts = split_one(str(tmp_path / "a"), "80,15,5", (300, 40, 10), RULES)
    assert parts.train is not None
    assert parts.valid is not None
    assert parts.test is not None
    seen = [tokens_of(part) for part in (parts.train, parts.valid, parts.test)]
    assert max(seen[0]) <= 800 < min(seen[1]) <= max(seen[1]) <= 950 < min(seen[2])
    assert [len(part) >= n for part, n in ((parts.train, 300), (parts.valid, 40), (parts.test, 10))] == [True] * 3


def test_changing_the_split_changes_the_samples(tmp_path: Path) -> None:
    make_pair(tmp_path / "a", [10] * 100)
    first = split_one(str(tmp_path / "a"), "80,20", (50, 0, 0), RULES).train
    second = split_one(str(tmp_path / "a"), "50,50", (50, 0, 0), RULES).train
    assert first is not None
    assert second is not None
    assert max(tokens_of(second)) <= 500 < max(tokens_of(first))


def test_an_empty_validation_part_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    make_pair(tmp_path / "a", [10] * 10)
    with pytest.raises(DataError, match=r"'969, 30, 1' of 10 documents gives train 10, valid 0, test 0.*eval_iters: 0"):
        split_one(str(tmp_path / "a"), "969, 30, 1", (50, 5, 5), RULES)
    assert split_one(str(tmp_path / "a"), "969, 30, 1", (50, 0, 0), RULES).valid is None


def test_an_empty_test_part_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pair(tmp_path / "a", [10] * 10)
    with caplog.at_level(logging.WARNING):
        assert split_one(str(tmp_path / "a"), "90,10,0", (50, 5, 5), RULES).test is None
    assert "no test will run" in caplog.text


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
def test_other_packings_keep_the_split(tmp_path: Path, packing: str) -> None:
    make_pair(tmp_path / "a", [5] * 20)
    rules = SampleRules(8, 1, packing)  # type: ignore[arg-type]
    parts = split_one(str(tmp_path / "a"), "50,50", (5, 5, 0), rules)
    assert parts.train is not None
    assert parts.valid is not None
    assert max(tokens_of(parts.train)) <= 50 < max(tokens_of(parts.valid))
    assert min(tokens_of(parts.valid) - {0}) > 50


def test_each_blended_part_has_upstreams_size(tmp_path: Path) -> None:
    for name, documents in (("a", 3), ("b", 160)):
        make_pair(tmp_path / name, [50] * documents)
    prefixes = [str(tmp_path / name) for name in "ab"]
    blend = blend_many("train", prefixes, RULES, 1000, weights=[0.001, 0.999])
    assert isinstance(blend, BlendedDataset)
    assert len(blend) == 1000
    small, large = blend.datasets
    assert isinstance(small, PackedDataset)
    assert isinstance(large, PackedDataset)
    # 999 samples of 8 tokens fit into one epoch of 8,000; the 1,004 that upstream asks for do not.
    assert len(large.document_order) == 2 * 160
    assert np.bincount(blend.dataset_ids).tolist() == [1, 999]


@pytest.mark.parametrize("weights", [[0.001, 0.999], [0.999, 0.001], [1.0, 0.0], [5.0, 7.0]])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 500])
def test_a_blend_is_never_overdrawn(tmp_path: Path, weights: list[float], num_samples: int) -> None:
    for name in "ab":
        make_pair(tmp_path / name, [4, 5])
    blend = blend_many("train", [str(tmp_path / name) for name in "ab"], RULES, num_samples, weights=weights)
    assert blend is not None
    for index in range(len(blend)):
        blend.sample(index)


def test_one_prefix_needs_no_blend(tmp_path: Path) -> None:
    make_pair(tmp_path / "a", [50] * 20)
    dataset = blend_many("train", [str(tmp_path / "a")], RULES, 100)
    assert isinstance(dataset, PackedDataset)
    assert len(dataset) >= 101, "upstream's margin of 0.5 %"


def test_epochs_pass_over_every_prefix_equally_often(tmp_path: Path) -> None:
    for name, documents in (("a", 3), ("b", 20), ("c", 7)):
        make_pair(tmp_path / name, [50] * documents)
    blend = blend_many("train", [str(tmp_path / name) for name in "abc"], RULES, 0, num_epochs=2)
    assert isinstance(blend, BlendedDataset)
    assert np.bincount(blend.dataset_ids).tolist() == [len(d) for d in blend.datasets]


def test_weights_by_documents_replace_the_list(tmp_path: Path) -> None:
    for name, documents in (("a", 10), ("b", 90)):
        make_pair(tmp_path / name, [9] * documents)
    prefixes = [str(tmp_path / name) for name in "ab"]
    blend = blend_many("train", prefixes, RULES, 1000, weights=[1.0, 0.0], alpha=0.3)
    assert isinstance(blend, BlendedDataset)
    assert np.bincount(blend.dataset_ids).tolist() == [823, 177]


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    make_pair(tmp_path / "a", [50])
    with pytest.raises(DataError, match="train_data_weights has 2 entries, train_data_paths has 1"):
        blend_many("train", [str(tmp_path / "a")], RULES, 1, weights=[1.0, 2.0])


def test_nothing_to_read_is_none(tmp_path: Path) -> None:
    assert blend_many("valid", [str(tmp_path / "not-even-there")], RULES, 0) is None
