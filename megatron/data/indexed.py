"""Read token files: `prefix.bin` (raw tokens) and `prefix.idx` (where each document lies), memory-mapped.

Reads upstream's `MMIDIDX` layout and the older `TNTIDX` one. Does not write (see `indexed_writer`), shuffle or cut
samples.
Invariant: an opened dataset is complete; a damaged or cut-off file is refused at opening, never at sample 3,000,000.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.common.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER_BYTES = 34
LEGACY_HEADER_BYTES = 56

# Upstream's codes. Later Megatron-LM gave 6 to float64; upstream's own files are read as upstream writes them.
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f4"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

_PROBE_BLOCKS = 64
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class IndexTable:
    """What an `.idx` file holds: token type, tokens per sequence, start of each, and document boundaries.

    Shapes: sizes [num_sequences] int32, starts [num_sequences] int64, document_index [num_documents + 1] int64.
    """

    dtype: np.dtype[Any]
    sizes: np.ndarray
    starts: np.ndarray
    document_index: np.ndarray


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the tokens of `prefix` lie."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Where the index of `prefix` lies."""
    return Path(f"{os.fspath(prefix)}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that upstream stores tokens of such a vocabulary in.

    Source: upstream facts 3.1 (uint16 below 65500 entries, int32 otherwise).
    """
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """Random access to the sequences of one token file pair.

    `sizes` holds tokens per sequence; `tokens` is the whole file as one flat array without copying; `starts` says where
    each sequence begins in it. Pickling carries the path only, so worker processes of any start method may receive it.

    Raises: DataError when a file is missing, of another kind, cut off, or does not belong to its partner.
    """

    def __init__(self, prefix: str | os.PathLike[str], warmup: bool = False) -> None:
        self.prefix = os.fspath(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(_missing_message(path, self.prefix))
        self._index_bytes = _map_file(idx_path(prefix))
        table = _parse_index(idx_path(prefix), self._index_bytes)
        self.dtype, self.document_index = table.dtype, table.document_index
        self.sizes, self.starts = table.sizes, table.starts
        self._check_bin_size()
        if warmup:
            _read_through(bin_path(prefix))
        self._bin_bytes = _map_file(bin_path(prefix))
        self.tokens: np.ndarray = np.frombuffer(self._bin_bytes, dtype=self.dtype)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get(index)

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences together."""
        return int(self.sizes.sum(dtype=np.int64))

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """A view of sequence `index`, from token `offset` on, `length` tokens or to the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        start, size = int(self.starts[index]), int(self.sizes[index])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"{self.prefix}: tokens {offset}..{stop} of sequence {index}, which has {size}")
        return self.tokens[start + offset : start + stop]

    @property
    def fingerprint(self) -> str:
        """A hash of the whole index and of blocks spread evenly over the tokens (the first and the last included).

        Reading every token of a terabyte at each start would cost hours; the index together with the blocks changes
        whenever the documents, their order or the tokenizer change.
        """
        if self._fingerprint is None:
            digest = hashlib.blake2b(self._index_bytes, digest_size=16)
            size = len(self._bin_bytes)
            digest.update(struct.pack("<Q", size))
            last = max(0, size - _PROBE_BYTES)
            for offset in sorted({last * k // (_PROBE_BLOCKS - 1) for k in range(_PROBE_BLOCKS)}):
                digest.update(self._bin_bytes[offset : offset + _PROBE_BYTES])
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _check_bin_size(self) -> None:
        ends = self.starts + self.sizes
        needed = int(ends.max(initial=0)) * self.dtype.itemsize
        if len(self) and (int(self.sizes.min()) < 0 or int(self.starts.min()) < 0):
            raise DataError(
                f"{idx_path(self.prefix)}: negative sizes or positions: the file is damaged. Write it again."
            )
        actual = bin_path(self.prefix).stat().st_size
        if actual != needed:
            kind = "is cut off" if actual < needed else "is longer than its index says"
            raise DataError(
                f"{bin_path(self.prefix)} {kind}: {actual:,} bytes, but {idx_path(self.prefix).name} describes "
                f"{needed:,} ({len(self):,} sequences of {self.dtype.name}). The two files do not belong together "
                "or a copy was interrupted: copy both again, or rerun tools/datasets/preprocess_data.py."
            )


def _map_file(path: Path) -> memoryview | bytes:
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return b""
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _read_through(path: Path) -> None:
    with open(path, "rb", buffering=0) as stream:
        while stream.read(64 << 20):
            pass


def _parse_index(path: Path, data: memoryview | bytes) -> IndexTable:
    if bytes(data[: len(MAGIC)]) == MAGIC:
        return _parse_mmap_index(path, data)
    if bytes(data[: len(LEGACY_MAGIC)]) == LEGACY_MAGIC:
        return _parse_legacy_index(path, data)
    raise DataError(
        f"{path} is not a token index: it begins with {bytes(data[:9])!r}, required is {MAGIC!r} (or the older "
        f"{LEGACY_MAGIC!r}). Give the prefix of a pair that tools/datasets/preprocess_data.py wrote."
    )


def _parse_mmap_index(path: Path, data: memoryview | bytes) -> IndexTable:
    _require_size(path, data, HEADER_BYTES, "its header")
    version, code, num_sequences, num_boundaries = struct.unpack_from("<QBQQ", data, len(MAGIC))
    dtype = _dtype_of(path, version, code)
    _require_size(
        path, data, HEADER_BYTES + 12 * num_sequences + 8 * num_boundaries, f"{num_sequences:,} sequences", exact=True
    )
    sizes = np.frombuffer(data, "<i4", num_sequences, HEADER_BYTES)
    pointers = np.frombuffer(data, "<i8", num_sequences, HEADER_BYTES + 4 * num_sequences)
    boundaries = np.frombuffer(data, "<i8", num_boundaries, HEADER_BYTES + 12 * num_sequences)
    return IndexTable(dtype, sizes, pointers // dtype.itemsize, boundaries)


def _parse_legacy_index(path: Path, data: memoryview | bytes) -> IndexTable:
    _require_size(path, data, LEGACY_HEADER_BYTES, "its header")
    version, code, element_size, num_sequences, num_sizes, num_boundaries = struct.unpack_from(
        "<6Q", data, len(LEGACY_MAGIC)
    )
    dtype = _dtype_of(path, version, code)
    numbers = 2 * (num_sequences + 1) + num_sizes + num_boundaries
    _require_size(path, data, LEGACY_HEADER_BYTES + 8 * numbers, f"{num_sequences:,} sequences", exact=True)
    if element_size != dtype.itemsize or num_sizes != num_sequences:
        raise DataError(
            f"{path}: element size {element_size} and {num_sizes} sizes for {num_sequences} sequences of "
            f"{dtype.name}: only one-dimensional token data can be read. Write the data again with "
            "tools/datasets/preprocess_data.py."
        )
    values = np.frombuffer(data, "<i8", numbers, LEGACY_HEADER_BYTES)
    offsets = values[num_sequences + 1 : 2 * num_sequences + 2]
    sizes = values[2 * num_sequences + 2 : 3 * num_sequences + 2]
    return IndexTable(dtype, sizes.astype(np.int32), offsets[:-1], values[3 * num_sequences + 2 :])


def _dtype_of(path: Path, version: int, code: int) -> np.dtype[Any]:
    if version != 1 or code not in DTYPE_OF_CODE:
        raise DataError(
            f"{path}: version {version}, type code {code}; required are version 1 and a code of "
            f"{sorted(DTYPE_OF_CODE)}. "
            "The file is damaged or of a newer kind: write it again with tools/datasets/preprocess_data.py."
        )
    return DTYPE_OF_CODE[code]


def _require_size(path: Path, data: Sequence[int], needed: int, what: str, exact: bool = False) -> None:
    if len(data) < needed or (exact and len(data) != needed):
        relation = "is cut off" if len(data) < needed else "is too long"
        raise DataError(
            f"{path} {relation}: {len(data):,} bytes, but {what} take {needed:,}. A copy or a run was interrupted: "
            "copy it again, or rerun tools/datasets/preprocess_data.py."
        )


def _missing_message(path: Path, prefix: str) -> str:
    hint = ""
    if prefix.endswith((".bin", ".idx")):
        hint = f" Give the prefix without its ending: {prefix[:-4]}."
    elif path.parent.is_dir():
        near = sorted(str(p)[:-4] for p in path.parent.glob("*.idx"))[:5]
        hint = f" Prefixes in that folder: {', '.join(near)}." if near else " That folder holds no .idx file."
    return f"data_path {prefix}: {path} does not exist.{hint} Make the pair with tools/datasets/preprocess_data.py."
