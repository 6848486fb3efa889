"""Small token files for the tests of this folder."""

from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedWriter


def make_pair(prefix: Path, sizes: list[int], dtype: str = "u2", first: int = 1) -> IndexedDataset:
    """Documents of the given sizes whose tokens count up from `first` without repetition."""
    tokens = np.arange(first, first + sum(sizes)).astype(dtype)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(tokens, np.array(sizes))
    return IndexedDataset(prefix)
