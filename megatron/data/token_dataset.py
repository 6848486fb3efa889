"""Samples of `seq_length + 1` tokens: packed documents, and blends of several such data sets.

Pure NumPy; knows neither ranks nor batches. A label file runs in parallel to its token file: same documents, same
sizes, unshifted, negative = ignored.
Invariant: sample i is a function of (seed, data set fingerprint, i) alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron.common.errors import DataError
from megatron.data.blending import build_blend, normalise_weights
from megatron.data.index_cache import cached_arrays, content_key
from megatron.data.indexed import IndexedDataset
from megatron.data.packing import build_packed_index, num_epochs_for

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Sample:
    """One sample. Shapes: tokens [S + 1] int64, labels [S + 1] int64 or None (then the labels are the tokens)."""

    tokens: np.ndarray
    labels: np.ndarray | None
    documents: list[int]


class TokenDataset(Protocol):
    """What the loader reads from."""

    seq_length: int
    has_labels: bool

    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever any sample may have changed."""

    @property
    def parts(self) -> dict[str, Any]:
        """What the samples follow from, by name, as JSON values: it tells why a fingerprint has changed."""

    def read_into(self, sample_ids: np.ndarray, tokens: np.ndarray, labels: np.ndarray | None) -> None:
        """Copy samples into rows. Shapes: sample_ids [B], tokens and labels [B, S + 1] of any integer type."""

    def sample(self, index: int) -> Sample:
        """One sample with the numbers of the documents it was cut from."""


def open_labels(prefix: str | os.PathLike[str], tokens: IndexedDataset, warmup: bool = False) -> IndexedDataset:
    """Open a label file and check that it runs in parallel to `tokens`."""
    labels = IndexedDataset(prefix, warmup)
    if not np.array_equal(labels.sizes, tokens.sizes):
        raise DataError(
            f"label data {labels.prefix} ({len(labels):,} documents, {labels.num_tokens:,} labels) does not run in "
            f"parallel to {tokens.prefix} ({len(tokens):,} documents, {tokens.num_tokens:,} tokens): every document "
            "needs one label per token. Write both in one run of tools/datasets/preprocess_data.py."
        )
    if np.issubdtype(labels.dtype, np.unsignedinteger):
        raise DataError(
            f"label data {labels.prefix} is {labels.dtype.name}, which cannot hold -100. Write it as int32."
        )
    return labels


class PackedDataset:
    """Documents in shuffled order, joined without gaps and cut every `seq_length` tokens (`pack_impl: packed`).

    Neighbouring samples share one token: the last label of one is the first token of the next. All samples that fit are
    used; upstream drops the last one.

    Raises: DataError when there are no documents or too few tokens for one sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        *,
        name: str,
        seq_length: int,
        seed: int,
        num_samples: int | None = None,
        num_epochs: int | None = None,
        documents: tuple[int, int] | None = None,
        labels: IndexedDataset | None = None,
    ) -> None:
        """Give either `num_samples` (the fewest whole epochs that hold them are used) or `num_epochs`."""
        self.indexed, self.labels, self.seq_length = indexed, labels, seq_length
        self.has_labels = labels is not None
        start, stop = documents or (0, len(indexed))
        num_tokens = int(indexed.sizes[start:stop].sum(dtype=np.int64))
        if num_tokens == 0:
            raise DataError(f"{indexed.prefix}: documents {start} to {stop} ({name}) hold no token.")
        if num_epochs is None:
            num_epochs = num_epochs_for(num_tokens, seq_length, num_samples or 1)
        label_fingerprint = labels.fingerprint if labels is not None else None
        self._fingerprint = content_key(
            "packed", indexed.fingerprint, label_fingerprint, start, stop, seq_length, seed, num_epochs
        )
        self.parts: dict[str, Any] = {
            "tokens": indexed.fingerprint,
            "labels": label_fingerprint,
            "documents": f"{start} to {stop}",
            "seq_length": seq_length,
            "seed": seed,
            "epochs": num_epochs,
            "pack_impl": "packed",
        }
        key = content_key("packed", indexed.fingerprint, start, stop, seq_length, seed, num_epochs)

        def build() -> Sequence[np.ndarray]:
            index = build_packed_index(indexed.sizes, np.arange(start, stop), seq_length, num_epochs, seed)
            return index.document_order, index.sample_starts, index.sample_order

        self.document_order, self.sample_starts, self.sample_order = cached_arrays(
            indexed.prefix,
            f"{name}_indexmap_{num_epochs}ep_{seq_length}sl_{seed}s_packedpi",
            key,
            ("doc_idx", "sample_idx", "shuffle_idx"),
            build,
        )

    def __len__(self) -> int:
        return len(self.sample_order)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def read_into(self, sample_ids: np.ndarray, tokens: np.ndarray, labels: np.ndarray | None) -> None:
        chosen = self.sample_order[sample_ids].astype(np.int64)
        spans = np.concatenate((self.sample_starts[chosen], self.sample_starts[chosen + 1]), axis=1).tolist()
        for row, span in enumerate(spans):
            self._copy_span(self.indexed, span, tokens[row])
            if labels is not None:
                assert self.labels is not None
                self._copy_span(self.labels, span, labels[row])

    def _copy_span(self, source: IndexedDataset, span: list[int], out: np.ndarray) -> None:
        first, offset, last, last_offset = span
        filled = 0
        for document in self.document_order[first : last + 1].tolist():
            begin = int(source.starts[document])
            end = begin + (last_offset + 1 if first == last else int(source.sizes[document]))
            piece = source.tokens[begin + offset : end]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            offset = 0
            first += 1
        assert filled == len(out)

    def sample(self, index: int) -> Sample:
        tokens = np.empty((1, self.seq_length + 1), np.int64)
        labels = np.empty_like(tokens) if self.has_labels else None
        self.read_into(np.array([index]), tokens, labels)
        chosen = int(self.sample_order[index])
        first, last = int(self.sample_starts[chosen, 0]), int(self.sample_starts[chosen + 1, 0])
        documents = self.document_order[first : last + 1].tolist()
        return Sample(tokens[0], labels[0] if labels is not None else None, documents)


class BlendedDataset:
    """Several data sets that take turns by weight; `num_samples` turns in all.

    The turns are known, and proven to stay inside every data set, before the first sample is read.

    Raises: DataError when a data set has fewer samples than its turns, or when only some have labels.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float], num_samples: int) -> None:
        self.datasets = list(datasets)
        self.seq_length = datasets[0].seq_length
        self.has_labels = datasets[0].has_labels
        if any(d.has_labels != self.has_labels or d.seq_length != self.seq_length for d in datasets):
            raise DataError("blended data sets must all have labels or all have none, and one seq_length.")
        blend = build_blend(weights, num_samples)
        self.dataset_ids, self.inner_ids = blend.dataset_ids, blend.sample_ids
        for index, (dataset, count) in enumerate(zip(datasets, blend.counts.tolist(), strict=True)):
            if count > len(dataset):
                raise DataError(
                    f"data set {index} of the blend has {len(dataset):,} samples, its weight calls for {count:,}."
                )
        # Without num_samples: the turns of a shorter blend are a prefix of those of a longer one.
        shares = normalise_weights(weights).tolist()
        self._fingerprint = content_key("blend", [d.fingerprint for d in datasets], shares)
        self.parts: dict[str, Any] = {f"data set {index}": dataset.parts for index, dataset in enumerate(datasets)}
        self.parts["weights"] = shares

    def __len__(self) -> int:
        return len(self.dataset_ids)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def read_into(self, sample_ids: np.ndarray, tokens: np.ndarray, labels: np.ndarray | None) -> None:
        owners, inner = self.dataset_ids[sample_ids], self.inner_ids[sample_ids]
        for row, owner in enumerate(owners.tolist()):
            one = slice(row, row + 1)
            self.datasets[owner].read_into(inner[one], tokens[one], labels[one] if labels is not None else None)

    def sample(self, index: int) -> Sample:
        return self.datasets[int(self.dataset_ids[index])].sample(int(self.inner_ids[index]))
