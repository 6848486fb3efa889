"""Training a tokenizer: deterministic, lossless by default, upstream's normalisation on request."""

import json
from pathlib import Path

import pytest

from megatron.common.errors import DataError
from megatron.tokenizer.build import make_tokenizer
from megatron.tokenizer.train_tokenizer import main, train_bpe, training_files

TEXTS = ["def ﬁrst(x²):\n    return x", "the cat sat on the mat, the cat sat", "naïve \uff21\uff22\uff23"] * 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return tmp_path / "in"


def train(folder: Path, output: Path, *options: str) -> Path:
    arguments = ["--json_input_dir", str(folder), "--tokenizer_output_path", str(output), "--tokenizer_type", "BPE"]
    assert main([*arguments, "-v", "300", *options]) == 0
    return output


def test_command_writes_a_lossless_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("HFTokenizer", str(train(folder, tmp_path / "t.json")))
    assert tokenizer.vocab_size <= 300
    assert (tokenizer.eod_id, tokenizer.pad_id) == (0, 1)
    for text in [*TEXTS, "never seen: ☃ \x00 \r\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the cat sat")) < 6


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "1.json").read_bytes() == train(folder, tmp_path / "2.json").read_bytes()


def test_upstreams_normalisation_on_request(folder: Path, tmp_path: Path) -> None:
    output = train(folder, tmp_path / "t.json", "--normalizer", "NFKC", "--add_prefix_space")
    tokenizer = make_tokenizer("HFTokenizer", str(output))
    assert tokenizer.decode(tokenizer.encode("ﬁrst x²")) == " first x2"


def test_a_folder_as_output_gets_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    train(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_evaluation_files_are_not_trained_on(folder: Path) -> None:
    for name in ("a_heldout.jsonl", "a_completion.jsonl", "tokenizer.json"):
        (folder / name).write_text("this is no document")
    assert [file.name for file in training_files(str(folder))] == ["a.jsonl"]
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match="evaluation files only"):
        training_files(str(folder))


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="at least 258"):
        train_bpe(iter(TEXTS), 257)
    assert train_bpe(iter(TEXTS), 258).get_vocab_size() == 258
