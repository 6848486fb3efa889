"""Samples that keep documents whole: as many as fit (`pack_impl: pack_until_overflow`) or one each (`unpacked`).

What a sample leaves free is filled with token 0 and ignored labels. Unlike upstream, a sample holds nothing of the
document that follows it, the split's range of documents is kept, and label files are not required.
Invariant: no document is divided between two samples; one longer than a sample is cut, or left out (`allow_chopped`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from megatron.common.errors import DataError
from megatron.data.index_cache import cached_arrays, content_key
from megatron.data.indexed import IndexedDataset
from megatron.data.packing import shuffled_order
from megatron.data.token_dataset import IGNORED_LABEL, Sample

DocumentPacking = Literal["pack_until_overflow", "unpacked"]


class DocumentDataset:
    """Whole documents in samples of `seq_length + 1` tokens; `read_into` always fills labels.

    Raises: DataError when no document can be used.
    """

    has_labels = True

    def __init__(
        self,
        indexed: IndexedDataset,
        *,
        name: str,
        seq_length: int,
        seed: int,
        packing: DocumentPacking,
        allow_chopped: bool = True,
        num_samples: int | None = None,
        num_epochs: int | None = None,
        documents: tuple[int, int] | None = None,
        labels: IndexedDataset | None = None,
    ) -> None:
        """Give either `num_samples` (the fewest whole epochs that hold them are used) or `num_epochs`."""
        self.indexed, self.labels, self.seq_length = indexed, labels, seq_length
        start, stop = documents or (0, len(indexed))
        label_fingerprint = labels.fingerprint if labels is not None else None
        # num_samples decides the number of epochs, which is known only after packing; so it is part of the key.
        wanted = (None, num_epochs) if num_epochs is not None else (num_samples or 1, None)
        parts = (packing, indexed.fingerprint, label_fingerprint, start, stop, seq_length, seed, allow_chopped)
        suffix = "_ac" if allow_chopped else ""

        def build() -> Sequence[np.ndarray]:
            usable = usable_documents(indexed, labels, (start, stop), seq_length, allow_chopped)
            if not len(usable):
                raise DataError(
                    f"{indexed.prefix}: none of the documents {start} to {stop} ({name}) can be used: they are "
                    f"empty, have only ignored labels, or are longer than seq_length + 1 = {seq_length + 1} with "
                    "allow_chopped: false."
                )
            return build_document_index(indexed.sizes, usable, seq_length, seed, packing, *wanted)

        self.document_order, self.sample_starts, self.sample_order = cached_arrays(
            indexed.prefix,
            f"{name}_indexmap_{wanted[0]}ns_{seq_length}sl_{seed}s_{packing}pi{suffix}",
            content_key(*parts, *wanted),
            ("doc_idx", "sample_idx", "shuffle_idx"),
            build,
        )
        self._fingerprint = content_key(*parts, len(self.document_order), len(self.sample_order))
        self.parts: dict[str, Any] = {
            "tokens": indexed.fingerprint,
            "labels": label_fingerprint,
            "documents": f"{start} to {stop}",
            "seq_length": seq_length,
            "seed": seed,
            "documents of all epochs": len(self.document_order),
            "samples": len(self.sample_order),
            "pack_impl": packing,
            "allow_chopped": allow_chopped,
        }

    def __len__(self) -> int:
        return len(self.sample_order)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def read_into(self, sample_ids: np.ndarray, tokens: np.ndarray, labels: np.ndarray | None) -> None:
        tokens[:] = 0
        if labels is not None:
            labels[:] = IGNORED_LABEL
        for row, index in enumerate(sample_ids.tolist()):
            filled = 0
            for document in self._documents(index):
                piece = self.indexed[document][: self.seq_length + 1]
                tokens[row, filled : filled + len(piece)] = piece
                if labels is not None:
                    source = piece if self.labels is None else self.labels[document][: len(piece)]
                    labels[row, filled : filled + len(piece)] = source
                filled += len(piece)

    def sample(self, index: int) -> Sample:
        tokens = np.empty((1, self.seq_length + 1), np.int64)
        labels = np.empty_like(tokens)
        self.read_into(np.array([index]), tokens, labels)
        return Sample(tokens[0], labels[0], self._documents(index))

    def _documents(self, index: int) -> list[int]:
        chosen = int(self.sample_order[index])
        documents: list[int] = self.document_order[self.sample_starts[chosen] : self.sample_starts[chosen + 1]].tolist()
        return documents


def usable_documents(
    indexed: IndexedDataset,
    labels: IndexedDataset | None,
    documents: tuple[int, int],
    seq_length: int,
    allow_chopped: bool,
) -> np.ndarray:
    """Numbers of the documents that can be learnt from. Shapes: result [k] int64, ascending."""
    numbers = np.arange(*documents)
    sizes = indexed.sizes[numbers]
    keep = sizes > 0
    if not allow_chopped:
        keep &= sizes <= seq_length + 1
    if labels is not None:
        keep &= np.array([bool((labels[int(number)] >= 0).any()) for number in numbers], bool)
    return numbers[keep]


def build_document_index(
    sizes: np.ndarray,
    documents: np.ndarray,
    seq_length: int,
    seed: int,
    packing: DocumentPacking,
    num_samples: int | None,
    num_epochs: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shuffled documents, where each sample begins among them, and the shuffled order of samples.

    Shapes: document_order [epochs * documents] int32, sample_starts [samples + 1] int64, sample_order [samples].
    """
    epochs = num_epochs or 1
    while True:
        rng = np.random.RandomState(seed)
        document_order = np.tile(documents.astype(np.int32), epochs)
        rng.shuffle(document_order)
        if packing == "unpacked":
            starts = np.arange(len(document_order) + 1, dtype=np.int64)
        else:
            starts = _fill_samples(np.minimum(sizes[document_order], seq_length + 1), seq_length + 1)
        found = len(starts) - 1
        if num_samples is None or found >= num_samples:
            return document_order, starts, shuffled_order(found, rng)
        epochs = max(epochs + 1, epochs * num_samples // found)


def _fill_samples(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Begin a new sample with the first document that no longer fits into the current one."""
    ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    following = (np.searchsorted(ends, ends[:-1] + capacity, side="right") - 1).tolist()
    starts, position = [0], 0
    while position < len(lengths):
        position = following[position]
        starts.append(position)
    return np.array(starts, np.int64)
