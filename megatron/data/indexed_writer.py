"""Write token files in upstream's exact bytes: `prefix.bin` and `prefix.idx` (`MMIDIDX`).

Takes arrays of many documents at once; keeps only their sizes in memory. Does not tokenise.
Invariant: a pair under its final name is complete and belongs together; an interrupted write leaves an older pair as
it was.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron.common.errors import DataError
from megatron.common.files import atomic_write, fsync_directory
from megatron.data.indexed import CODE_OF_DTYPE, MAGIC, IndexedDataset, bin_path, idx_path


def encode_index(dtype: np.dtype[Any], sizes: np.ndarray, document_index: np.ndarray) -> bytes:
    """The bytes of an `.idx` file for sequences that lie one after the other.

    Source: upstream facts 3.1. Shapes: sizes [num_sequences], document_index [num_documents + 1], starting with 0.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    pointers = np.zeros(len(sizes), dtype="<i8")
    pointers[1:] = ends[:-1] * dtype.itemsize
    header = struct.pack("<QBQQ", 1, CODE_OF_DTYPE[np.dtype(dtype)], len(sizes), len(document_index))
    return b"".join(
        (MAGIC, header, sizes.astype("<i4").tobytes(), pointers.tobytes(), document_index.astype("<i8").tobytes())
    )


class IndexedWriter:
    """Context manager that writes one token file pair and publishes it when the block ends without an exception."""

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype[Any] | str | type) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            raise DataError(f"{self.prefix}: tokens cannot be stored as {self.dtype.name}; use uint16 or int32.")
        self._sizes: list[np.ndarray] = []
        self._boundaries: list[np.ndarray] = [np.zeros(1, np.int64)]
        self.num_sequences = 0
        self.num_tokens = 0

    def __enter__(self) -> IndexedWriter:
        target = bin_path(self.prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        self._temporary = Path(name)
        self._stream = os.fdopen(fd, "wb", buffering=1 << 20)
        return self

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents of one sequence each: their tokens joined in one array, and how many belong to each."""
        self._append(tokens, sizes)
        self._boundaries.append(np.arange(self.num_sequences - len(sizes), self.num_sequences, dtype=np.int64) + 1)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append every sequence of an existing dataset with its document boundaries."""
        if dataset.dtype != self.dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype.name}, {self.prefix} is written as {self.dtype.name}: "
                "data sets of different token types (or tokenizers) cannot be merged."
            )
        first = self.num_sequences
        ordered = len(dataset) == 0 or np.array_equal(dataset.starts[1:], np.cumsum(dataset.sizes, dtype=np.int64)[:-1])
        if ordered:
            self._append(dataset.tokens, dataset.sizes)
        else:
            for index in range(len(dataset)):
                self._append(dataset[index], dataset.sizes[index : index + 1])
        self._boundaries.append(dataset.document_index[1:].astype(np.int64) + first)

    def _append(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        if int(np.sum(sizes, dtype=np.int64)) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens, but the sizes sum to {int(np.sum(sizes))}")
        if tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if len(tokens) and not limits.min <= int(tokens.min()) <= int(tokens.max()) <= limits.max:
                raise DataError(f"{self.prefix}: token {int(tokens.max())} does not fit into {self.dtype.name}.")
            tokens = tokens.astype(self.dtype)
        self._stream.write(np.ascontiguousarray(tokens).data)
        self._sizes.append(np.asarray(sizes, np.int32))
        self.num_sequences += len(sizes)
        self.num_tokens += len(tokens)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        index = encode_index(
            self.dtype, np.concatenate(self._sizes or [np.zeros(0, np.int32)]), np.concatenate(self._boundaries)
        )
        pending = idx_path(self.prefix).with_name(f".{idx_path(self.prefix).name}.new")
        with atomic_write(pending, "wb") as stream:
            stream.write(index)
        os.chmod(self._temporary, pending.stat().st_mode & 0o777)
        # Without its .idx a pair counts as absent, so that no moment exists at which an old index describes new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._temporary, bin_path(self.prefix))
        os.replace(pending, idx_path(self.prefix))
        fsync_directory(bin_path(self.prefix).parent)
