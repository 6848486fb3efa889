"""Reading corpora: every kind of file gives the same documents, damage and bad lines are named."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron.common.documents import Block, find_inputs, parse_documents, read_blocks
from megatron.common.errors import DataError

TEXTS = ["one", "zwei\nzeilen", "", "drei " * 50, "ünïcode", "last"]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def texts(path: Path, block_bytes: int = 64) -> list[str]:
    return [text for block in read_blocks(path, block_bytes) for (text,) in parse_documents(block, ("text",))]


def as_zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed (requirements-data.txt)")
    half = len(data) // 2
    compress = zstandard.ZstdCompressor().compress
    return compress(data[:half]) + compress(data[half:])  # two frames, as parallel compressors write


def as_tar(data: bytes, name: str = "in.jsonl") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def as_zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("folder/in.jsonl", data)
    return out.getvalue()


ENCODINGS = {
    "a.jsonl": lambda data: data,
    "a.json": lambda data: data,
    "a.jsonl.gz": gzip.compress,
    "a.json.gz": gzip.compress,
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
    "a.jsonl.zst": as_zst,
    "a.tar": as_tar,
    "a.tar.gz": lambda data: gzip.compress(as_tar(data)),
    "a.jsonl.zst.tar": lambda data: as_tar(as_zst(data), "in.jsonl.zst"),
    "a.zip": as_zip,
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str, block_bytes: int) -> None:
    (tmp_path / name).write_bytes(ENCODINGS[name](LINES))
    assert texts(tmp_path / name, block_bytes) == TEXTS
    (tmp_path / name).write_bytes(ENCODINGS[name](LINES[:-1]))  # no newline at the end
    assert texts(tmp_path / name, block_bytes) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_plain_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    text = "line one\nline two\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert texts(tmp_path / name) == [text]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2", "a.tar", "a.zip"])
def test_cut_off_files_are_refused(tmp_path: Path, name: str) -> None:
    whole = ENCODINGS[name](LINES)
    # A tar ends in blocks of zeros, which may be missing; its content may not.
    (tmp_path / name).write_bytes(whole[: 700 if name == "a.tar" else len(whole) * 2 // 3])
    with pytest.raises(DataError, match=f"{name} is damaged or cut off"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "not JSON"),
        (b"[1]", "a JSON list"),
        (b'{"body": "x"}', "no key 'text'.*'body'"),
        (b'{"text": 3}', "'text' is a int"),
        (b'{"text": "\xff"}', "not JSON"),
    ],
)
@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, message: str, block_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n{"text": "y"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:4: {message}"):
        texts(tmp_path / "a.jsonl", block_bytes)


def test_several_keys_and_lists_of_paragraphs() -> None:
    block = Block("x", 1, b'{"q": "a", "text": ["b", "c"]}', True)
    assert parse_documents(block, ("text", "q")) == [("b\n\nc", "a")]


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        texts(tmp_path / "a.txt")


def test_inputs_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "c.jsonl.zst", "tokenizer.json", "x.bin"):
        (tmp_path / name).touch()
    assert [p.name for p in find_inputs([str(tmp_path)])] == ["a.txt", "b.jsonl", "c.jsonl.zst"]
    assert [p.name for p in find_inputs([str(tmp_path / "tokenizer.json")])] == ["tokenizer.json"]
    with pytest.raises(DataError, match="no such file"):
        find_inputs([str(tmp_path / "missing.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        find_inputs([str(tmp_path / "empty")])
