"""`CharLevelTokenizer`: one id per UTF-8 byte. Needs no file.

Facts of upstream kept: 512 entries, end of document 0, padding 1, ids below 32 decode as a space-range character.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.tokenizer.base import hash_parts

_FIRST_PRINTABLE = 32


class CharLevelTokenizer:
    """UTF-8 bytes as ids."""

    def __init__(self) -> None:
        self.vocab_size = 512
        self.eod_id: int | None = 0
        self.pad_id: int | None = 1
        self.source_files: list[Path] = []
        self.fingerprint = hash_parts("CharLevelTokenizer", "1")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Newlines and tabs are kept (upstream turns them into spaces); other ids below 32 become a space."""
        data = bytes(i if _FIRST_PRINTABLE <= i < 256 or i in (9, 10, 13) else _FIRST_PRINTABLE for i in ids)
        return data.decode("utf-8", errors="replace")
