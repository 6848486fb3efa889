"""One function that makes a tokenizer from plain values."""

from __future__ import annotations

from megatron.common.errors import DataError
from megatron.tokenizer import byte_level_bpe
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.char_level import CharLevelTokenizer
from megatron.tokenizer.optional_libraries import SentencePieceTokenizer, TiktokenTokenizer

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "HFTokenizer",
    "HFGPT2Tokenizer",
    "CharLevelTokenizer",
    "SPMTokenizer",
    "TiktokenTokenizer",
)


def make_tokenizer(tokenizer_type: str, vocab_file: str | None = None, merge_file: str | None = None) -> Tokenizer:
    """The tokenizer that upstream's keys describe.

    Raises: DataError when the type is unknown, a file is missing or of another kind, or a library is not installed.
    """
    match tokenizer_type:
        case "GPT2BPETokenizer":
            return byte_level_bpe.load_gpt2(vocab_file, merge_file)
        case "HFTokenizer":
            return byte_level_bpe.load_json(vocab_file)
        case "HFGPT2Tokenizer":
            return byte_level_bpe.load_hf_gpt2(vocab_file)
        case "CharLevelTokenizer":
            return CharLevelTokenizer()
        case "SPMTokenizer":
            return SentencePieceTokenizer(vocab_file)
        case "TiktokenTokenizer":
            return TiktokenTokenizer(vocab_file)
    raise DataError(f"tokenizer_type = {tokenizer_type!r}: required is one of {', '.join(TOKENIZER_TYPES)}.")
