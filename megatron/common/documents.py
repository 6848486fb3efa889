"""Read documents from text corpora: JSON lines and plain text, compressed or archived, in bounded memory.

Splits files into blocks of whole lines (cheap, sequential) and parses a block into documents (costly, done in workers).
Invariant: the documents and their order depend on the files alone, not on the block size.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron.common.errors import DataError

BLOCK_BYTES = 1 << 20
_LINE_ENDINGS = (".jsonl", ".json", ".ndjson")
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_ARCHIVES = (".tar", ".tgz", ".zip")

Document = tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Whole lines of a JSONL file, or one whole text file. `first_line` counts from 1."""

    source: str
    first_line: int
    data: bytes
    is_json_lines: bool


def find_inputs(paths: Iterable[str]) -> list[Path]:
    """The files behind a list of files and folders; a folder gives its corpus files in the order of their names.

    Raises: DataError when one is missing or a folder holds none.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and is_corpus_file(p.name))
            if not inside:
                raise DataError(
                    f"input {path}: the folder holds no .jsonl or .txt file (also .gz, .zst, .bz2, .xz, .tar, .zip)."
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"input {path}: no such file or folder (working directory {Path.cwd()}).")
    return files


def is_corpus_file(name: str) -> bool:
    """Whether a file in a folder counts as a corpus."""
    stem = _without_compression(name)
    if stem == name and name.endswith(".json"):
        return (
            False  # far more often a tokenizer or a configuration than documents; give it by name where it is a corpus
        )
    return stem.endswith((*_LINE_ENDINGS, ".txt", *_ARCHIVES))


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The blocks of one file; of an archive, those of its members in the order they are stored.

    Raises: DataError when the file is damaged or cut off, or a library for it is missing.
    """
    try:
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if not member.is_dir():
                        with archive.open(member) as stream:
                            yield from _member_blocks(f"{path}:{member.filename}", member.filename, stream, block_bytes)
        elif _without_compression(path.name).endswith((".tar", ".tgz")):
            with open(path, "rb") as raw, tarfile.open(fileobj=_decompress(path.name, raw), mode="r|") as tar:
                for entry in tar:
                    if (inner := tar.extractfile(entry) if entry.isfile() else None) is not None:
                        yield from _member_blocks(f"{path}:{entry.name}", entry.name, inner, block_bytes)
        else:
            with open(path, "rb") as raw:
                yield from _member_blocks(str(path), path.name, raw, block_bytes)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or cut off ({error}). Fetch or copy it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def parse_documents(block: Block, keys: Sequence[str]) -> list[Document]:
    """The documents of a block: for each, the texts under `keys` (a plain text file has the one key `text`).

    A list of texts under a key is joined by blank lines. Empty lines are passed over.

    Raises: DataError with file and line when a line is not a JSON object or lacks a key.
    """
    if not block.is_json_lines:
        try:
            text = block.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{block.source}: not UTF-8 at byte {error.start}. Convert it, e.g. with iconv.") from error
        if tuple(keys) != ("text",):
            raise DataError(f"{block.source}: plain text has only the key 'text', asked for: {', '.join(keys)}.")
        return [(text,)]
    documents = []
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if line.strip():
            documents.append(_parse_line(line, f"{block.source}:{number}", keys))
    return documents


def _parse_line(line: bytes, where: str, keys: Sequence[str]) -> Document:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        shown = line[:60].decode("utf-8", errors="replace")
        raise DataError(f"{where}: not JSON ({error}): {shown!r}. Required is one JSON object a line.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}; required is an object with the key {keys[0]!r}.")
    texts = []
    for key in keys:
        value = record.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = "\n\n".join(value)
        if not isinstance(value, str):
            given = f"{key!r} is a {type(value).__name__}" if key in record else f"no key {key!r}"
            raise DataError(
                f"{where}: {given}; required is text. Keys here: {', '.join(map(repr, record))}. Choose with "
                "--jsonl-keys."
            )
        texts.append(value)
    return tuple(texts)


def _member_blocks(source: str, name: str, raw: IO[bytes], block_bytes: int) -> Iterator[Block]:
    stream = _decompress(name, raw)
    if not _without_compression(name).endswith(_LINE_ENDINGS):
        yield Block(source, 1, stream.read(), False)
        return
    line, rest = 1, b""
    while chunk := stream.read(block_bytes):
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            rest += chunk
            continue
        data = rest + head
        yield Block(source, line, data, True)
        line += data.count(b"\n") + 1
        rest = tail
    if rest:
        yield Block(source, line, rest, True)


def _decompress(name: str, raw: IO[bytes]) -> IO[bytes]:
    if name.endswith((".gz", ".tgz")):
        return gzip.open(raw)  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return bz2.open(raw)
    if name.endswith(".xz"):
        return lzma.open(raw)
    if name.endswith(".zst"):
        return _ZstdStream(name, raw)  # type: ignore[return-value]
    return raw


class _ZstdStream:
    """Reads a zstandard file and notices when it ends too early, which the library itself passes over."""

    def __init__(self, name: str, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{name} needs the package zstandard: pip install -r requirements/requirements-data.txt"
            ) from error
        self._raw, self._library = raw, zstandard
        self._frame: Any = None
        self._pending = b""
        self._compressed = b""

    def read(self, size: int = -1) -> bytes:
        parts, wanted = [self._pending], size - len(self._pending)
        self._pending = b""
        while size < 0 or wanted > 0:
            piece = self._next_piece()
            if not piece:
                break
            parts.append(piece)
            wanted -= len(piece)
        data = b"".join(parts)
        if 0 <= size < len(data):
            data, self._pending = data[:size], data[size:]
        return data

    def _next_piece(self) -> bytes:
        while True:
            if not self._compressed:
                self._compressed = self._raw.read(1 << 18)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("the last zstandard frame is incomplete")
                    return b""
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                piece: bytes = self._frame.decompress(self._compressed)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
            if piece:
                return piece


def _without_compression(name: str) -> str:
    for ending in _COMPRESSIONS:
        name = name.removesuffix(ending)
    return name
