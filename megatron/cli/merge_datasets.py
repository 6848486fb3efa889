"""`tools/datasets/merge_datasets.py`: join all token file pairs of a folder into one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.common.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedWriter


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and merge."""
    parser = argparse.ArgumentParser(description="Join all .bin/.idx pairs of a folder, in the order of their names.")
    parser.add_argument("--input", required=True, help="folder with the pairs")
    parser.add_argument("--output-prefix", required=True, help="prefix of the pair to write")
    options = parser.parse_args(arguments)
    folder, output = Path(options.input), Path(options.output_prefix)
    if not folder.is_dir():
        raise DataError(f"--input {folder}: no such folder.")
    prefixes = [path.with_suffix("") for path in sorted(folder.glob("*.idx")) if path.with_suffix("") != output]
    if not prefixes:
        raise DataError(f"--input {folder}: the folder holds no .idx file to merge.")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    with IndexedWriter(output, datasets[0].dtype) as writer:
        for dataset in datasets:
            print(f"{dataset.prefix}: {len(dataset):,} documents, {dataset.num_tokens:,} tokens")
            writer.add_dataset(dataset)
    print(f"wrote {output}: {writer.num_sequences:,} documents, {writer.num_tokens:,} tokens")
    return 0
