"""Tokenizers: golden ids of independent implementations, lossless round trips, errors that name the fix."""

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.common.errors import DataError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import TOKENIZER_TYPES, make_tokenizer
from megatron.tokenizer.setup import build_tokenizer
from megatron.tokenizer.train_tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT.parent / "shared" / "data" / "tokenizers"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"the tokenizer files of GPT-2 and 20B are not in {GOLDEN}"
)

GOLDEN_CASES = {
    "20B": ("HFTokenizer", "20B_tokenizer.json", None, 50277, 0, 1),
    "gpt2": ("GPT2BPETokenizer", "gpt2-vocab.json", "gpt2-merges.txt", 50257, 50256, None),
}


@needs_golden
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_ids(name: str) -> None:
    kind, vocab, merges, vocab_size, eod_id, pad_id = GOLDEN_CASES[name]
    tokenizer = make_tokenizer(kind, str(GOLDEN / vocab), str(GOLDEN / merges) if merges else None)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.pad_id) == (vocab_size, eod_id, pad_id)
    cases = [line.rsplit(" => ", 1) for line in (GOLDEN / f"golden-{name}.txt").read_text("utf-8").splitlines()]
    assert len(cases) == 100
    texts, ids = [text for text, _ in cases], [[int(i) for i in numbers.split(",")] for _, numbers in cases]
    assert tokenizer.encode_batch(texts) == ids
    assert [tokenizer.encode(text) for text in texts] == ids
    assert [tokenizer.decode(one) for one in ids] == texts
    assert tokenizer.encode("a<|endoftext|>b")[1] == eod_id


@needs_golden
def test_hfgpt2_reads_a_folder_and_adds_padding(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes((GOLDEN / "gpt2-vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((GOLDEN / "gpt2-merges.txt").read_bytes())
    tokenizer = make_tokenizer("HFGPT2Tokenizer", str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.pad_id) == (50258, 50256, 50257)
    assert tokenizer.encode("Hello World!") == [15496, 2159, 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    text = Path(__file__).read_text("utf-8")
    path.write_text(train_bpe(iter([text, text.lower()]), 600).to_str(), "utf-8")
    return path


def test_all_types_share_one_interface(trained: Path) -> None:
    for tokenizer in (make_tokenizer("HFTokenizer", str(trained)), make_tokenizer("CharLevelTokenizer")):
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.vocab_size > max(tokenizer.encode("häuser\n"))
        assert tokenizer.eod_id == 0
        assert tokenizer.pad_id == 1
        assert len(tokenizer.fingerprint) == 32
    assert make_tokenizer("HFTokenizer", str(trained)).source_files == [trained]


def test_the_config_section_is_enough(trained: Path) -> None:
    section = SimpleNamespace(tokenizer_type="HFTokenizer", vocab_file=str(trained), merge_file=None)
    assert build_tokenizer(section).fingerprint == make_tokenizer("HFTokenizer", str(trained)).fingerprint


def test_factories_travel_to_worker_processes(trained: Path) -> None:
    make = pickle.loads(pickle.dumps(partial(make_tokenizer, "HFTokenizer", str(trained))))
    assert make().encode("def f") == make_tokenizer("HFTokenizer", str(trained)).encode("def f")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(trained: Path, text: str) -> None:
    tokenizer = make_tokenizer("HFTokenizer", str(trained))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
def test_characters_come_back(text: str) -> None:
    tokenizer = make_tokenizer("CharLevelTokenizer")
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text + "\n\t")) == text + "\n\t"


def test_character_ids_that_are_no_bytes_become_spaces() -> None:
    assert make_tokenizer("CharLevelTokenizer").decode([72, 0, 1, 511, 105]) == "H   i"


def test_special_pieces_are_kept_in_decoded_text(trained: Path) -> None:
    tokenizer = make_tokenizer("HFTokenizer", str(trained))
    assert tokenizer.decode([*tokenizer.encode("a"), 0]) == "a<|endoftext|>"


def test_a_saved_truncation_is_not_applied(trained: Path, tmp_path: Path) -> None:
    description = json.loads(trained.read_text("utf-8"))
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), "utf-8")
    tokenizer = make_tokenizer("HFTokenizer", str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("a longer text")) == "a longer text"


def test_sentencepiece(tmp_path: Path) -> None:
    library = pytest.importorskip(
        "sentencepiece", reason="sentencepiece is not installed (requirements-tokenizers.txt)"
    )
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=33, minloglevel=2,
        user_defined_symbols=["<|endoftext|>", "<|padding|>"],
    )  # fmt: skip
    tokenizer = make_tokenizer("SPMTokenizer", str(tmp_path / "m.model"))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab_size == 33
    assert tokenizer.decode(tokenizer.encode("the lazy fox")) == "the lazy fox"
    assert tokenizer.encode_batch(["the", "fox"]) == [tokenizer.encode("the"), tokenizer.encode("fox")]
    assert tokenizer.eod_id != tokenizer.pad_id
    assert tokenizer.decode([tokenizer.eod_id or -1]) == "<|endoftext|>"


@pytest.mark.parametrize(("kind", "library"), [("SPMTokenizer", "sentencepiece"), ("TiktokenTokenizer", "tiktoken")])
def test_a_missing_library_names_the_requirements(
    trained: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r"requirements/requirements-tokenizers\.txt"):
        make_tokenizer(kind, str(trained))


def test_errors_say_what_is_needed(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    cases = [
        (("HFTokenizer", str(trained.parent / "missing.json")), rf"no such file.*Did you mean {trained}"),
        (("HFTokenizer", None), "needs vocab_file"),
        (("HFTokenizer", str(tmp_path / "broken.json")), r"is not a tokenizer\.json"),
        (("GPT2BPETokenizer", str(trained), None), "needs merge_file"),
        (("GPT2BPETokenizer", str(trained), str(trained)), "are not a byte-level BPE"),
        (("HFGPT2Tokenizer", str(tmp_path)), r"neither tokenizer\.json nor vocab\.json"),
        (("SPMTokenizer", str(trained)), "not a SentencePiece model"),
        (("TiktokenTokenizer", "no_such_base"), "no tiktoken encoding"),
        (("Unknown",), "required is one of " + ", ".join(TOKENIZER_TYPES)),
    ]
    for arguments, message in cases:
        if arguments[0] == "SPMTokenizer":
            pytest.importorskip("sentencepiece")
        if arguments[0] == "TiktokenTokenizer":
            pytest.importorskip("tiktoken")
        with pytest.raises(DataError, match=message):
            make_tokenizer(*arguments)  # type: ignore[arg-type]


def test_the_hot_path_does_not_import_transformers_or_torch(trained: Path) -> None:
    code = (
        "import sys; from megatron.tokenizer.build import make_tokenizer;"
        f"make_tokenizer('HFTokenizer', {str(trained)!r}).encode('x');"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'sentencepiece', 'tiktoken'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
