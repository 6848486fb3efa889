"""A real configuration to its data sets."""

from pathlib import Path

import pytest

from megatron.common.errors import DataError
from megatron.config import Config, load
from megatron.data.setup import build_datasets
from megatron.data.token_dataset import BlendedDataset, PackedDataset
from tests.unit.data.builders import make_pair

MODEL = {
    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, "max_position_embeddings": 8,
    "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "tokenizer_type": "CharLevelTokenizer",
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}}, "lr_decay_style": "constant", "min_lr": 0.0,
    "train_iters": 10, "eval_interval": 4, "eval_iters": 2, "seed": 77,
}  # fmt: skip


def config(**keys: object) -> Config:
    return load(overrides={**MODEL, **keys}, devices=1)


def test_one_prefix_is_split(tmp_path: Path) -> None:
    indexed = make_pair(tmp_path / "a", [10] * 100)
    datasets = build_datasets(config(data_path=str(tmp_path / "a"), split="80,10,10"))
    for dataset, needed, documents in (
        (datasets.train, 40, (0, 80)),
        (datasets.valid, 24, (80, 90)),
        (datasets.test, 8, (90, 100)),
    ):
        assert isinstance(dataset, PackedDataset)
        assert len(dataset) >= needed
        name = {0: "train", 80: "valid", 90: "test"}[documents[0]]
        expected = PackedDataset(indexed, name=name, seq_length=8, seed=77, num_samples=needed, documents=documents)
        assert dataset.fingerprint == expected.fingerprint


def test_lists_of_prefixes_are_blended(tmp_path: Path) -> None:
    for name in "abv":
        make_pair(tmp_path / name, [10] * 30)
    datasets = build_datasets(
        config(
            train_data_paths=[str(tmp_path / "a"), str(tmp_path / "b")],
            train_data_weights=[1.0, 3.0],
            valid_data_paths=[str(tmp_path / "v")],
            test_data_paths=[str(tmp_path / "v")],
        )
    )
    assert isinstance(datasets.train, BlendedDataset)
    assert len(datasets.train) == 40
    assert datasets.train.dataset_ids.sum() == 30
    assert isinstance(datasets.valid, PackedDataset)


def test_no_validation_is_read_without_eval_iters(tmp_path: Path) -> None:
    make_pair(tmp_path / "a", [10] * 100)
    datasets = build_datasets(config(data_path=str(tmp_path / "a"), eval_iters=0))
    assert datasets.valid is None
    assert datasets.test is None


def test_missing_data_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.idx does not exist"):
        build_datasets(config(data_path=str(tmp_path / "missing")))
