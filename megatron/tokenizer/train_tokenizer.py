"""Train a byte-level BPE tokenizer: `python megatron/tokenizer/train_tokenizer.py --json_input_dir DIR ...`.

Any text comes back unchanged from encoding and decoding, unless asked for otherwise: upstream normalises to NFKC, which
rewrites source code (it turns `ﬁ` into `fi`), and puts a space before every text; `--normalizer NFKC
--add_prefix_space` restores that. Invariant: the same input gives the same tokenizer, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a script: the folder of this file would hide the package
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.common.documents import find_inputs, parse_documents, read_blocks
from megatron.common.errors import DataError, run_main
from megatron.common.files import atomic_write_text
from megatron.tokenizer.base import EOD_PIECE, PAD_PIECE

NORMALIZERS = ("none", "NFC", "NFKC")
# Files that prepare_data.py writes for evaluation: a tokenizer must not be trained on them.
_EVALUATION_ENDINGS = ("_heldout", "_completion")


def train_bpe(
    texts: Iterator[str], vocab_size: int, normalizer: str = "none", add_prefix_space: bool = False
) -> tokenizers.Tokenizer:
    """A byte-level BPE with `<|endoftext|>` as id 0 and `<|padding|>` as id 1.

    Raises: DataError when `vocab_size` does not even hold the 256 bytes and the two special pieces.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise DataError(
            f"vocab_size = {vocab_size}: required are at least {len(alphabet) + 2} (256 bytes, 2 special pieces)."
        )
    library = tokenizers.Tokenizer(models.BPE())
    if normalizer != "none":
        library.normalizer = {"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}[normalizer]()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD_PIECE, PAD_PIECE], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return library


def training_files(folder: str) -> list[Path]:
    """The corpus files of a folder (or the file itself) without those made for evaluation."""
    files = [file for file in find_inputs([folder]) if not file.name.split(".")[0].endswith(_EVALUATION_ENDINGS)]
    if not files:
        raise DataError(f"--json_input_dir {folder}: the folder holds evaluation files only.")
    return files


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for block in itertools.chain.from_iterable(map(read_blocks, files)):
        for (text,) in parse_documents(block, ("text",)):
            yield text


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on JSONL files.")
    parser.add_argument(
        "--json_input_dir", required=True, help="folder of .jsonl(.gz|.zst) files with the key text, or one file"
    )
    parser.add_argument("--tokenizer_output_path", required=True, help="tokenizer.json to write")
    parser.add_argument("--tokenizer_type", default="BPE", choices=["BPE"])
    parser.add_argument("-v", "--vocab_size", type=int, default=52000, help="entries, special pieces included [52000]")
    parser.add_argument("--normalizer", default="none", choices=NORMALIZERS, help="NFKC is what upstream does [none]")
    parser.add_argument(
        "--add_prefix_space", action="store_true", help="put a space before every text, as upstream does"
    )
    options = parser.parse_args(arguments)
    files = training_files(options.json_input_dir)
    print(f"training on {', '.join(map(str, files[:5]))}{' ...' if len(files) > 5 else ''}")
    library = train_bpe(_texts(files), options.vocab_size, options.normalizer, options.add_prefix_space)
    output = options.tokenizer_output_path
    if os.path.isdir(output):
        output = os.path.join(output, "tokenizer.json")
    atomic_write_text(output, library.to_str(pretty=True))
    print(f"{output}: {library.get_vocab_size():,} entries")
    return 0


if __name__ == "__main__":
    run_main(main)
