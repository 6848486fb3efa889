"""Tokenising corpora: the same bytes for any number of workers, every key, empty documents, nothing half-way."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.common import documents
from megatron.common.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import PreprocessJob, preprocess
from megatron.data.provenance import describe_job, is_up_to_date, record_job


class ByteEncoder:
    """Bytes as ids, 0 ends a document."""

    def __init__(self, vocab_size: int = 256, eod_id: int | None = 0) -> None:
        self.vocab_size, self.eod_id = vocab_size, eod_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def job(tmp_path: Path, records: list[dict[str, str]], **options: object) -> PreprocessJob:
    values: dict[str, object] = {
        "inputs": [str(write_lines(tmp_path / "in.jsonl", records))],
        "output_prefix": str(tmp_path / "out"),
        "report": lambda line: None,
    }
    return PreprocessJob(**{**values, **options})  # type: ignore[arg-type]


def documents_of(tmp_path: Path, key: str = "text") -> list[bytes]:
    dataset = IndexedDataset(tmp_path / f"out_{key}_document")
    return [bytes(dataset[i].tolist()) for i in range(len(dataset))]


def test_documents_come_back(tmp_path: Path) -> None:
    totals = preprocess(job(tmp_path, [{"text": "ab"}, {"text": "c"}], append_eod=True), ByteEncoder)
    assert documents_of(tmp_path) == [b"ab\0", b"c\0"]
    assert (totals.documents, totals.tokens) == (2, {"text": 5})
    assert IndexedDataset(tmp_path / "out_text_document").dtype.name == "uint16"


def test_a_large_vocabulary_is_stored_as_int32(tmp_path: Path) -> None:
    preprocess(job(tmp_path, [{"text": "ab"}]), functools.partial(ByteEncoder, 65500))
    assert IndexedDataset(tmp_path / "out_text_document").dtype.name == "int32"


def test_every_key_gets_its_own_text(tmp_path: Path) -> None:
    records = [{"q": "ab", "a": "x"}, {"q": "", "a": "y"}, {"q": "", "a": ""}]
    totals = preprocess(job(tmp_path, records, keys=["q", "a"], append_eod=True), ByteEncoder)
    assert documents_of(tmp_path, "q") == [b"ab\0", b"\0"]
    assert documents_of(tmp_path, "a") == [b"x\0", b"y\0"]
    assert totals.empty == 1


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    lines: list[str] = []
    records = [{"text": ""}, {"text": "a"}, {"text": ""}]
    totals = preprocess(job(tmp_path, records, append_eod=True, report=lines.append), ByteEncoder)
    assert documents_of(tmp_path) == [b"a\0"]
    assert totals.empty == 2
    assert "1 documents" in lines[-1]
    assert "2 empty ones left out" in lines[-1]
    assert "MB/s" in lines[-1]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small blocks, so that several workers have several blocks each.
    small = functools.partial(documents.read_blocks, block_bytes=200)
    monkeypatch.setattr("megatron.data.preprocess.read_blocks", small)
    records = [{"text": "x" * (n * 7 % 50) + str(n)} for n in range(200)]
    written = set()
    for workers in (1, 2, 3):
        preprocess(job(tmp_path, records, workers=workers, append_eod=True), ByteEncoder)
        pair = [(tmp_path / f"out_text_document{ending}").read_bytes() for ending in (".bin", ".idx")]
        written.add(tuple(pair))
    assert len(written) == 1
    assert documents_of(tmp_path)[199] == b"x" * (199 * 7 % 50) + b"199\0"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_leaves_the_older_output(tmp_path: Path, workers: int) -> None:
    preprocess(job(tmp_path, [{"text": "old"}]), ByteEncoder)
    broken = job(tmp_path, [{"text": "new"}, {"body": "?"}], workers=workers)
    with pytest.raises(DataError, match=r"in\.jsonl:2"):
        preprocess(broken, ByteEncoder)
    assert documents_of(tmp_path) == [b"old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out_text_document.bin", "out_text_document.idx"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document with text"):
        preprocess(job(tmp_path, [{"text": ""}]), ByteEncoder)
    with pytest.raises(DataError, match="--append-eod"):
        preprocess(job(tmp_path, [{"text": "a"}], append_eod=True), functools.partial(ByteEncoder, 256, None))
    with pytest.raises(DataError, match="no such file"):
        preprocess(job(tmp_path, [], inputs=[str(tmp_path / "nothing.jsonl")]), ByteEncoder)
    assert not (tmp_path / "out_text_document.idx").exists()


def test_reuse_sees_what_the_output_was_made_from(tmp_path: Path) -> None:
    one = job(tmp_path, [{"text": "a"}])
    assert not is_up_to_date(one, describe_job(one, "tokenizer-1"))
    preprocess(one, ByteEncoder)
    record_job(one, describe_job(one, "tokenizer-1"))
    assert is_up_to_date(one, describe_job(one, "tokenizer-1"))
    assert not is_up_to_date(one, describe_job(one, "tokenizer-2"))
    changed = job(tmp_path, [{"text": "abc"}])
    assert not is_up_to_date(changed, describe_job(changed, "tokenizer-1"))


def test_reuse_notices_a_cut_off_output(tmp_path: Path) -> None:
    one = job(tmp_path, [{"text": "abc"}])
    preprocess(one, ByteEncoder)
    record_job(one, describe_job(one, "t"))
    (tmp_path / "out_text_document.bin").write_bytes(b"a")
    assert not is_up_to_date(one, describe_job(one, "t"))


def test_broken_encodings_are_mended_on_request(tmp_path: Path) -> None:
    pytest.importorskip("ftfy", reason="ftfy is not installed (requirements-data.txt)")
    records = [{"text": "schÃ¶n"}]
    preprocess(job(tmp_path, records, fix_text=True), ByteEncoder)
    assert documents_of(tmp_path) == ["schön".encode()]
    preprocess(job(tmp_path, records), ByteEncoder)
    assert documents_of(tmp_path) == ["schÃ¶n".encode()]


def test_the_progress_line_knows_the_number_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("megatron.data.preprocess.time.perf_counter", lambda: float(next(clock)))
    small = functools.partial(documents.read_blocks, block_bytes=40)
    monkeypatch.setattr("megatron.data.preprocess.read_blocks", small)
    lines: list[str] = []
    records = [{"text": f"number {n}"} for n in range(20)]
    preprocess(job(tmp_path, records, num_docs=20, log_interval=5, report=lines.append), ByteEncoder)
    assert len(lines) == 4
    assert " of 20 documents" in lines[0]
    assert lines[-1].startswith("20 documents")
