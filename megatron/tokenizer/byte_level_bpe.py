"""Tokenizers that the `tokenizers` library runs: a tokenizer.json, or GPT-2's vocabulary and merges.

No `transformers` here: importing it takes longer than tokenising a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron.common.errors import DataError
from megatron.tokenizer.base import EOD_PIECE, PAD_PIECE, hash_parts, require_file


class LibraryTokenizer:
    """Any tokenizer of the `tokenizers` library behind the `Tokenizer` interface."""

    def __init__(self, library: tokenizers.Tokenizer, source_files: list[Path]) -> None:
        # A tokenizer.json may carry the padding or cutting of whoever saved it; documents need neither.
        library.no_padding()
        library.no_truncation()
        self._library = library
        self.source_files = source_files
        self.eod_id = library.token_to_id(EOD_PIECE)
        self.pad_id = library.token_to_id(PAD_PIECE)
        # Ids may have holes, so the number of pieces is not enough: every id must have a row in the embedding.
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = hash_parts(library.to_str())

    def take_marks(self, settings: Path) -> None:
        """Where the vocabulary has no end-of-document piece of the usual name, take the one that the settings of
        transformers beside it name (Llama's </s>); padding likewise."""
        if not settings.is_file():
            return
        try:
            values = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{settings} is no JSON ({error}). Mend it, or move it away.") from error
        for own, key in (("eod_id", "eos_token"), ("pad_id", "pad_token")):
            piece = values.get(key)
            piece = piece.get("content") if isinstance(piece, dict) else piece
            if getattr(self, own) is None and isinstance(piece, str):
                setattr(self, own, self._library.token_to_id(piece))

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=False)


def load_json(vocab_file: str | None) -> LibraryTokenizer:
    """`HFTokenizer`: a tokenizer.json. Raises: DataError when it is missing or not one."""
    path = require_file(vocab_file, "vocab_file", "HFTokenizer")
    tokenizer = LibraryTokenizer(_read_json(path), [path])
    tokenizer.take_marks(path.with_name("tokenizer_config.json"))
    return tokenizer


def load_gpt2(vocab_file: str | None, merge_file: str | None) -> LibraryTokenizer:
    """`GPT2BPETokenizer`: byte-level BPE from a vocabulary and merges; ids equal GPT-2's."""
    vocab = require_file(vocab_file, "vocab_file", "GPT2BPETokenizer")
    merges = require_file(merge_file, "merge_file", "GPT2BPETokenizer")
    return LibraryTokenizer(_byte_level(vocab, merges), [vocab, merges])


def load_hf_gpt2(name_or_path: str | None) -> LibraryTokenizer:
    """`HFGPT2Tokenizer`: a folder, a tokenizer.json, or a name on the Hugging Face hub (unset: `gpt2`).

    As upstream does, `<|padding|>` is added behind the vocabulary when it is not part of it.
    """
    name = name_or_path or "gpt2"
    path = Path(name)
    if path.is_file():
        library, files = _read_json(path), [path]
    elif (path / "tokenizer.json").is_file():
        library, files = _read_json(path / "tokenizer.json"), [path / "tokenizer.json"]
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        files = [path / "vocab.json", path / "merges.txt"]
        library = _byte_level(*files)
    elif path.is_dir():
        raise DataError(f"vocab_file = {name}: the folder holds neither tokenizer.json nor vocab.json with merges.txt.")
    else:
        library, files = _from_hub(name), []
    if library.token_to_id(PAD_PIECE) is None:
        library.add_special_tokens([PAD_PIECE])
    return LibraryTokenizer(library, files)


def _read_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"vocab_file = {path} is not a tokenizer.json of the tokenizers library ({error}). For a vocabulary "
            "with merges set tokenizer_type: GPT2BPETokenizer with merge_file."
        ) from error


def _byte_level(vocab_file: Path, merge_file: Path) -> tokenizers.Tokenizer:
    try:
        vocab, merges = models.BPE.read_file(str(vocab_file), str(merge_file))
        library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"vocab_file = {vocab_file}, merge_file = {merge_file} are not a byte-level BPE ({error}). Required are "
            "GPT-2's JSON vocabulary and merges; for a tokenizer.json set tokenizer_type: HFTokenizer."
        ) from error
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    specials = [piece for piece in (EOD_PIECE, PAD_PIECE) if piece in json.loads(vocab_file.read_bytes())]
    library.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    return library


def _from_hub(name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"vocab_file = {name}: no such file or folder, and it cannot be fetched from the Hugging Face hub "
            f"({error}). Without network give a local folder with vocab.json and merges.txt, or a tokenizer.json."
        ) from error
