"""What every tokenizer offers, and the errors they share.

Invariant: two tokenizers with one `fingerprint` give the same ids for every text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from megatron.common.errors import DataError

EOD_PIECE = "<|endoftext|>"
PAD_PIECE = "<|padding|>"


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    `vocab_size` is one more than the largest id. `eod_id` ends a document, `pad_id` fills; None where the vocabulary
    has no such piece. `source_files` are the files that define it, for copying beside a checkpoint or an export.
    """

    vocab_size: int
    eod_id: int | None
    pad_id: int | None
    source_files: list[Path]
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, in order."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special pieces are kept, bytes that are no UTF-8 become U+FFFD."""


def require_file(path: str | None, key: str, tokenizer_type: str) -> Path:
    """The file named by a key.

    Raises: DataError when the key is unset or the file is missing, saying what kind of file belongs there.
    """
    wanted = _WHAT_BELONGS_THERE.get((tokenizer_type, key), "a tokenizer file")
    if not path:
        raise DataError(f"tokenizer_type: {tokenizer_type} needs {key}: {wanted}. Set it to the path of that file.")
    file = Path(path)
    if not file.is_file():
        hint = f" Did you mean {near}?" if (near := _similar_file(file)) else ""
        raise DataError(
            f"{key} = {path}: no such file (working directory {Path.cwd()}). {tokenizer_type} needs {wanted} "
            f"there.{hint}{_HOW_TO_GET.get(tokenizer_type, '')}"
        )
    return file


def hash_parts(*parts: bytes | str) -> str:
    """A fingerprint of what defines a tokenizer."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def _similar_file(file: Path) -> Path | None:
    folder = file.parent if file.parent.is_dir() else None
    same_ending = (
        sorted(p for p in folder.glob(f"*{file.suffix}") if "token" in p.name or "vocab" in p.name) if folder else []
    )
    return same_ending[0] if same_ending else None


_WHAT_BELONGS_THERE = {
    ("HFTokenizer", "vocab_file"): "a tokenizer.json of the tokenizers library",
    ("GPT2BPETokenizer", "vocab_file"): "the JSON vocabulary of a byte-level BPE (gpt2-vocab.json)",
    ("GPT2BPETokenizer", "merge_file"): "the merges of a byte-level BPE (gpt2-merges.txt)",
    ("SPMTokenizer", "vocab_file"): "a SentencePiece .model file",
}
_HOW_TO_GET = {
    "HFTokenizer": " Train one with: python megatron/tokenizer/train_tokenizer.py --json_input_dir DIR "
    "--tokenizer_output_path FILE --tokenizer_type BPE",
    "GPT2BPETokenizer": " `python prepare_data.py enwik8` fetches both files into its data folder.",
}
