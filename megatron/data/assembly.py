"""From paths, proportions and weights to the train, validation and test data sets of a run. Plain values only.

Invariant: the three data sets never share a document when they come from one `data_path`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron.common.errors import DataError
from megatron.data.blending import build_blend, normalise_weights
from megatron.data.document_dataset import DocumentDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.splits import SPLIT_NAMES, document_weights, split_boundaries
from megatron.data.token_dataset import BlendedDataset, PackedDataset, TokenDataset, open_labels

logger = logging.getLogger(__name__)

# Each blended data set is built this much larger than its share: upstream's factor, kept because it decides the
# number of epochs and with it the order of samples.
_MARGIN = 1.005


@dataclass(frozen=True)
class Datasets:
    """The data sets of a run; None where no step would read from one."""

    train: TokenDataset | None
    valid: TokenDataset | None
    test: TokenDataset | None


@dataclass(frozen=True)
class SampleRules:
    """How documents become samples, for all data sets of a run alike."""

    seq_length: int
    seed: int
    packing: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    allow_chopped: bool = True
    warmup: bool = False


def split_one(
    prefix: str, split: str, num_samples: Sequence[int], rules: SampleRules, train_epochs: int | None = None
) -> Datasets:
    """Cut one data set into the three parts by documents (`data_path` with `split`).

    Units: num_samples counts samples that the run reads of train, valid, test; a part of which none are read is None.

    Raises: DataError when a part that the run reads from gets no document.
    """
    indexed = IndexedDataset(prefix, rules.warmup)
    boundaries = split_boundaries(split, len(indexed))
    parts: list[TokenDataset | None] = []
    for position, (name, needed) in enumerate(zip(SPLIT_NAMES, num_samples, strict=True)):
        documents = (boundaries[position], boundaries[position + 1])
        epochs = train_epochs if name == "train" else None
        if needed == 0 and epochs is None:
            parts.append(None)
        elif documents[0] < documents[1]:
            parts.append(_make_dataset(indexed, name, rules, needed, epochs, documents=documents))
        elif name == "test":
            # The test set is read once after training; a small data set often has no document left for it.
            logger.warning(
                "%s: split %r leaves no document of %d for the test set: no test will run", prefix, split, len(indexed)
            )
            parts.append(None)
        else:
            raise DataError(_empty_part(name, prefix, split, len(indexed), boundaries))
    return Datasets(*parts)


def blend_many(
    name: str,
    prefixes: Sequence[str],
    rules: SampleRules,
    num_samples: int,
    *,
    weights: Sequence[float] | None = None,
    label_prefixes: Sequence[str] | None = None,
    alpha: float | None = None,
    num_epochs: int | None = None,
) -> TokenDataset | None:
    """One data set from several prefixes that take turns by weight (`train_data_paths` and its kin).

    `alpha` (of `weight_by_num_documents`) replaces the weights; `num_epochs` passes over every prefix that often, each
    weighted by its size, in place of `num_samples`.

    Raises: DataError when lists differ in length.
    """
    if num_samples == 0 and num_epochs is None:
        return None
    for other, key in ((weights, f"{name}_data_weights"), (label_prefixes, f"{name}_label_data_paths")):
        if other is not None and len(other) != len(prefixes):
            raise DataError(
                f"{key} has {len(other)} entries, {name}_data_paths has {len(prefixes)}: give one for each path."
            )
    tokens = [IndexedDataset(prefix, rules.warmup) for prefix in prefixes]
    labels: list[IndexedDataset | None] = [None] * len(tokens)
    if label_prefixes is not None:
        labels = [open_labels(p, t, rules.warmup) for p, t in zip(label_prefixes, tokens, strict=True)]
    if alpha is not None:
        weights = document_weights([len(one) for one in tokens], alpha)
    shares = normalise_weights(weights if weights is not None else [1.0] * len(tokens)).tolist()
    counts = build_blend(shares, num_samples).counts.tolist() if num_epochs is None else [0] * len(tokens)
    datasets: list[TokenDataset] = [
        _make_dataset(
            one,
            f"{name}_{index}",
            rules,
            max(math.ceil(num_samples * shares[index] * _MARGIN), counts[index]),
            num_epochs,
            labels=labels[index],
        )
        for index, one in enumerate(tokens)
    ]
    if num_epochs is not None:
        shares = [float(len(dataset)) for dataset in datasets]
        num_samples = sum(len(dataset) for dataset in datasets)
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, shares, num_samples)


def _make_dataset(
    indexed: IndexedDataset,
    name: str,
    rules: SampleRules,
    num_samples: int,
    num_epochs: int | None,
    documents: tuple[int, int] | None = None,
    labels: IndexedDataset | None = None,
) -> TokenDataset:
    if rules.packing == "packed":
        return PackedDataset(
            indexed,
            name=name,
            seq_length=rules.seq_length,
            seed=rules.seed,
            num_samples=num_samples,
            num_epochs=num_epochs,
            documents=documents,
            labels=labels,
        )
    return DocumentDataset(
        indexed,
        name=name,
        seq_length=rules.seq_length,
        seed=rules.seed,
        packing=rules.packing,
        allow_chopped=rules.allow_chopped,
        num_samples=num_samples,
        num_epochs=num_epochs,
        documents=documents,
        labels=labels,
    )


def _empty_part(name: str, prefix: str, split: str, num_documents: int, boundaries: Sequence[int]) -> str:
    sizes = [after - before for before, after in itertools.pairwise(boundaries)]
    advice = "set eval_iters: 0 to train without validation" if name == "valid" else "raise its first proportion"
    return (
        f"data_path {prefix}: split = {split!r} of {num_documents:,} documents gives train {sizes[0]:,}, valid "
        f"{sizes[1]:,}, test {sizes[2]:,}, but the run reads from {name}. Use more documents, a split with a larger "
        f"share for {name} (for example '90, 5, 5'), or {advice}."
    )
