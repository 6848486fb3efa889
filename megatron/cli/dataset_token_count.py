"""`tools/datasets/dataset_token_count.py`: how many documents and tokens token files hold."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron.data.indexed import IndexedDataset


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and count."""
    parser = argparse.ArgumentParser(description="Count the documents and tokens of .bin/.idx pairs.")
    parser.add_argument("prefixes", nargs="+", metavar="prefix", help="path without .bin or .idx")
    total = 0
    for prefix in parser.parse_args(arguments).prefixes:
        dataset = IndexedDataset(prefix)
        total += dataset.num_tokens
        print(f"{prefix}: {len(dataset):,} documents, {dataset.num_tokens:,} tokens, {dataset.dtype.name}")
    print(f"total: {total:,} tokens")
    return 0
