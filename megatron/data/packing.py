"""The three index arrays of packed samples: document order, where each sample begins, and the order of samples.

Pure NumPy on plain values; knows no files (see `index_cache`) and reads no tokens.
Invariant: for a given seed the arrays equal upstream's value for value, so a run's data order carries over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.common.errors import DataError


@dataclass(frozen=True)
class PackedIndex:
    """Index arrays of one data set.

    Shapes: document_order [epochs * documents] int32; sample_starts [num_samples + 1, 2] int32 or int64, rows of
    (position in document_order, token offset in that document); sample_order [num_samples] uint32 or int64.
    """

    document_order: np.ndarray
    sample_starts: np.ndarray
    sample_order: np.ndarray


def num_epochs_for(num_tokens: int, seq_length: int, num_samples: int) -> int:
    """The fewest passes over `num_tokens` that hold `num_samples` samples (neighbours share one token)."""
    return max(1, -(-(num_samples * seq_length + 1) // num_tokens))


def build_packed_index(
    sizes: np.ndarray, documents: np.ndarray, seq_length: int, num_epochs: int, seed: int
) -> PackedIndex:
    """Build the arrays for the documents numbered in `documents`, repeated `num_epochs` times and shuffled as a whole.

    Shapes: sizes [all documents], tokens of each; documents [k] int32, the numbers that take part.
    Source: upstream facts 3.3 (one legacy RandomState; documents shuffled first, then samples).
    """
    rng = np.random.RandomState(seed)
    document_order = np.tile(documents.astype(np.int32), num_epochs)
    rng.shuffle(document_order)
    sample_starts = _sample_starts(sizes, document_order, seq_length)
    return PackedIndex(document_order, sample_starts, shuffled_order(len(sample_starts) - 1, rng))


def shuffled_order(num_samples: int, rng: np.random.RandomState) -> np.ndarray:
    """A shuffled `arange(num_samples)` in the narrowest type upstream uses."""
    dtype = np.uint32 if num_samples < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(num_samples, dtype=dtype)
    rng.shuffle(order)
    return order


def _sample_starts(sizes: np.ndarray, document_order: np.ndarray, seq_length: int) -> np.ndarray:
    ends = np.cumsum(sizes[document_order], dtype=np.int64)
    num_samples = (int(ends[-1]) - 1) // seq_length if len(ends) else 0
    if num_samples < 1:
        raise DataError(
            f"{int(ends[-1]) if len(ends) else 0} tokens do not fill one sample of seq_length = {seq_length} (plus "
            "the next token). Use more data or a smaller seq_length."
        )
    dtype = np.int32 if 2 * (num_samples + 1) < np.iinfo(np.int32).max else np.int64
    positions = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    # Sample i begins in the first document that ends behind its first token; empty documents hold no token.
    owners = np.searchsorted(ends, positions, side="right")
    starts = np.empty((num_samples + 1, 2), dtype)
    starts[:, 0] = owners
    starts[:, 1] = positions - (ends - sizes[document_order])[owners]
    starts[0] = 0
    return starts
