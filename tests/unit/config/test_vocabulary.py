"""Vocabulary sizes read without the tokenizer, against the tokenizer itself where it can be built here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, trainers

from megatron.config.vocabulary import Vocabulary, count_pieces, vocabulary_of


def test_equals_the_built_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(
        ["to be or not to be"], trainers.BpeTrainer(vocab_size=30, special_tokens=["<e>", "<p>"])
    )
    tokenizer.add_tokens(["extra"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert vocabulary_of("HFTokenizer", str(path)) == Vocabulary(tokenizer.get_vocab_size())


def test_unigram_lists_and_gaps_count_by_the_largest_id(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 9}]}))
    assert vocabulary_of("HFTokenizer", str(path)).size == 10
    path.write_text(json.dumps({"a": 0, "b": 6}))
    assert vocabulary_of("GPT2BPETokenizer", str(path)).size == 7


def test_sentencepiece_counts_its_pieces(tmp_path: Path) -> None:
    def piece(text: bytes) -> bytes:
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\x3f"
        return b"\x0a" + bytes([len(body)]) + body

    model = piece(b"<unk>") + piece(b"a" * 100) + b"\x12\x02\x18\x01" + b"\x18\x05" + piece(b"z")
    path = tmp_path / "t.model"
    path.write_bytes(model)
    assert vocabulary_of("SPMTokenizer", str(path)).size == 3
    with pytest.raises(ValueError, match="not a SentencePiece"):
        count_pieces(model[:-1])
    with pytest.raises(ValueError, match="not a SentencePiece"):
        count_pieces(b"hello world")


@pytest.mark.parametrize(
    ("kind", "file", "expected"),
    [
        ("CharLevelTokenizer", None, Vocabulary(512)),
        ("HFTokenizer", "nowhere/20B_tokenizer.json", Vocabulary(50277, assumed=True)),
        ("GPT2BPETokenizer", "nowhere/gpt2-vocab.json", Vocabulary(50257, assumed=True)),
        ("HFTokenizer", "nowhere/mine.json", Vocabulary(None, assumed=True)),
        ("HFGPT2Tokenizer", None, Vocabulary(50257)),
        ("TiktokenTokenizer", "cl100k_base", Vocabulary(100277)),
        ("TiktokenTokenizer", "unheard_of", Vocabulary(None)),
        ("GPT2BPETokenizer", None, Vocabulary(50257, assumed=True)),
    ],
)
def test_without_a_file(kind: str, file: str | None, expected: Vocabulary) -> None:
    assert vocabulary_of(kind, file) == expected


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ("[]", "holds a list"), ("{}", "no model.vocab")]
)
def test_a_wrong_file_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        vocabulary_of("HFTokenizer", str(path))
