"""Tokenizers whose library is not installed by default: SentencePiece and tiktoken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.common.errors import DataError
from megatron.tokenizer.base import EOD_PIECE, PAD_PIECE, hash_parts, require_file

_REQUIREMENTS = "requirements/requirements-tokenizers.txt"


class SentencePieceTokenizer:
    """`SPMTokenizer`: a SentencePiece model. Source: upstream facts 4.8 (without `<|endoftext|>` the unknown id
    ends)."""

    def __init__(self, vocab_file: str | None) -> None:
        path = require_file(vocab_file, "vocab_file", "SPMTokenizer")
        try:
            import sentencepiece
        except ImportError as error:
            raise _missing_library("SPMTokenizer", "sentencepiece") from error
        try:
            self._library = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"vocab_file = {path} is not a SentencePiece model ({error}).") from error
        self.vocab_size: int = self._library.vocab_size()
        self.eod_id: int | None = self._library.piece_to_id(EOD_PIECE)
        padding = self._library.piece_to_id(PAD_PIECE)
        self.pad_id: int | None = padding if padding != self._library.unk_id() else None
        self.source_files = [path]
        self.fingerprint = hash_parts("SPMTokenizer", path.read_bytes())

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._library.encode(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode([int(i) for i in ids]))


class TiktokenTokenizer:
    """`TiktokenTokenizer`: an encoding of tiktoken, named in `vocab_file` (for example `cl100k_base`)."""

    def __init__(self, encoding_name: str | None) -> None:
        if not encoding_name:
            raise DataError(
                "tokenizer_type: TiktokenTokenizer needs vocab_file: the name of an encoding, e.g. cl100k_base."
            )
        try:
            import tiktoken
        except ImportError as error:
            raise _missing_library("TiktokenTokenizer", "tiktoken") from error
        if encoding_name not in tiktoken.list_encoding_names():
            raise DataError(
                f"vocab_file = {encoding_name} is no tiktoken encoding; required is one of "
                f"{', '.join(tiktoken.list_encoding_names())}."
            )
        try:
            self._library = tiktoken.get_encoding(encoding_name)
        except Exception as error:  # network errors of whichever HTTP library it uses
            raise DataError(
                f"the tiktoken encoding {encoding_name} could not be loaded ({error}). It is fetched on first use: "
                "run once with network, or set TIKTOKEN_CACHE_DIR to a folder that holds it."
            ) from error
        self.vocab_size: int = self._library.n_vocab
        self.eod_id: int | None = self._library.eot_token
        self.pad_id: int | None = None
        self.source_files: list[Path] = []
        self.fingerprint = hash_parts("TiktokenTokenizer", encoding_name, str(self.vocab_size))

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, allowed_special="all")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._library.encode_batch(list(texts), num_threads=1, allowed_special="all")

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids))


def _missing_library(tokenizer_type: str, library: str) -> DataError:
    return DataError(
        f"tokenizer_type: {tokenizer_type} needs the package {library}, which is not installed. "
        f"Install it with: pip install -r {_REQUIREMENTS}"
    )
