"""How many ids a tokenizer has, read from its file without loading the tokenizer.

Does not tokenise. Invariant: the number equals that of the tokenizer built from the same file (largest id + 1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

CHARACTERS = 512
# Sizes by file name, for planning on a machine that does not have the file.
WELL_KNOWN_FILES = {
    "20B_tokenizer.json": 50277,
    "gpt2-vocab.json": 50257,
    "vocab.json": 50257,
}
# What a model file without its data file means: GPT-2's vocabulary, GPT-NeoX-20B's.
USUAL_SIZES = {"GPT2BPETokenizer": 50257, "HFTokenizer": 50277}
TIKTOKEN_ENCODINGS = {
    "gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "cl100k_base": 100277,
    "o200k_base": 200019,
}
HF_NAMES = {"gpt2": 50257, "gpt2-medium": 50257, "gpt2-large": 50257, "gpt2-xl": 50257, "openai-community/gpt2": 50257}


@dataclass(frozen=True)
class Vocabulary:
    """size: ids; None where neither the file nor its name tells. assumed: known by name only, not read."""

    size: int | None
    assumed: bool = False


def vocabulary_of(tokenizer_type: str, vocab_file: str | None) -> Vocabulary:
    """The size of a tokenizer's vocabulary.

    Raises: ValueError with the reason, if the file exists and is not what the tokenizer needs.
    """
    if tokenizer_type == "CharLevelTokenizer":
        return Vocabulary(CHARACTERS)
    if tokenizer_type == "TiktokenTokenizer":
        return Vocabulary(TIKTOKEN_ENCODINGS.get(vocab_file or "cl100k_base"))
    if tokenizer_type == "HFGPT2Tokenizer" and (vocab_file is None or vocab_file in HF_NAMES):
        return Vocabulary(HF_NAMES[vocab_file or "gpt2"])
    if vocab_file is None:
        return Vocabulary(USUAL_SIZES.get(tokenizer_type), assumed=True)
    path = Path(vocab_file)
    if path.is_dir() and tokenizer_type == "HFGPT2Tokenizer":
        path = path / "vocab.json"
    if not path.is_file():
        return Vocabulary(WELL_KNOWN_FILES.get(path.name), assumed=True)
    if tokenizer_type == "SPMTokenizer":
        return Vocabulary(count_pieces(path.read_bytes()))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{vocab_file} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{vocab_file} holds a {type(content).__name__}, not a mapping")
    return Vocabulary(
        _tokenizer_json_size(content, vocab_file) if tokenizer_type == "HFTokenizer" else _largest(content) + 1
    )


def _tokenizer_json_size(content: dict[str, object], name: str) -> int:
    model = content.get("model")
    entries = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(entries, dict | list):
        raise ValueError(f"{name} has no model.vocab; HFTokenizer needs a tokenizer.json of the tokenizers library")
    largest = len(entries) - 1 if isinstance(entries, list) else _largest(entries)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        largest = max(largest, int(token["id"]))
    return largest + 1


def _largest(entries: dict[str, object]) -> int:
    return max((value for value in entries.values() if isinstance(value, int)), default=-1)


def count_pieces(model: bytes) -> int:
    """Pieces in a SentencePiece model: the entries of field 1 in its protocol buffer."""
    position = pieces = 0
    while position < len(model):
        tag, position = _varint(model, position)
        if tag & 7 == 2:
            length, position = _varint(model, position)
            position += length
            pieces += tag >> 3 == 1
        elif tag & 7 == 0:
            _, position = _varint(model, position)
        elif tag & 7 in (1, 5):
            position += 8 if tag & 7 == 1 else 4
        else:
            raise ValueError("not a SentencePiece model")
    if position != len(model) or not pieces:
        raise ValueError("not a SentencePiece model")
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value |= (byte & 127) << shift
        position += 1
        shift += 7
        if byte < 128:
            return value, position
    raise ValueError("not a SentencePiece model")
