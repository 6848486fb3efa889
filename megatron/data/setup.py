"""From the run's configuration to its data sets: the one file here that sees a `Config`."""

from __future__ import annotations

from megatron.common.errors import DataError
from megatron.config import Config
from megatron.data.assembly import Datasets, SampleRules, blend_many, split_one
from megatron.data.labelled import require_label_names
from megatron.data.splits import SPLIT_NAMES, samples_needed

__all__ = ["Datasets", "build_datasets"]


def build_datasets(config: Config) -> Datasets:
    """Open the run's token files, build or map their index arrays, and say which samples the run reads.

    Raises: DataError when files are missing or damaged, when no data is named, or when a part that is read is empty.
    """
    data, training = config.data, config.training
    assert config.model.seq_length is not None, "a resolved configuration has a seq_length"
    assert config.batch.train_batch_size is not None, "a resolved configuration has a train_batch_size"
    rules = SampleRules(config.model.seq_length, training.seed, data.pack_impl, data.allow_chopped, data.mmap_warmup)
    epochs = training.train_epochs
    needed = samples_needed(
        training.train_iters or 0, config.batch.train_batch_size, training.eval_interval, training.eval_iters
    )
    if config.model.task != "causal_lm":
        prefixes = [p for name in SPLIT_NAMES for p in getattr(data, f"{name}_label_data_paths") or ()]
        require_label_names(prefixes, config.model.label_names or (), config.model.task)
    if data.train_data_paths is not None:
        parts = [
            blend_many(
                name,
                getattr(data, f"{name}_data_paths"),
                rules,
                count,
                weights=getattr(data, f"{name}_data_weights"),
                label_prefixes=getattr(data, f"{name}_label_data_paths"),
                alpha=data.weighted_sampler_alpha if data.weight_by_num_documents else None,
                num_epochs=epochs if name == "train" else None,
            )
            for name, count in zip(SPLIT_NAMES, needed, strict=True)
        ]
        return Datasets(*parts)
    if data.data_path is None:
        raise DataError(
            "the configuration names no data: set data_path to the prefix of a .bin/.idx pair, or train_data_paths, "
            "valid_data_paths and test_data_paths. Make one with tools/datasets/preprocess_data.py or prepare_data.py."
        )
    return split_one(data.data_path, data.split, needed, rules, epochs)
