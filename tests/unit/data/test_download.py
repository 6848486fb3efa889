"""Fetching over a loopback HTTP server: complete or absent, continued after a cut, checked."""

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron.common.errors import DataError
from megatron.data import corpora
from megatron.data.corpora import Corpus, download
from megatron.data.download import fetch

BODY = bytes(range(256)) * 9000


class Server(ThreadingHTTPServer):
    """Serves BODY; `cut_after` bytes of an answer the connection is dropped, `cuts` times."""

    body, etag, cuts, cut_after, ranges = BODY, '"v1"', 0, 1_500_000, True
    requests: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        if "missing" in self.path:
            self.send_error(404)
            return
        body, start = self.server.body, 0
        if wanted and self.server.ranges and self.headers.get("If-Range", "") == self.server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.server.cuts > 0:
            self.server.cuts -= 1
            self.wfile.write(body[start : start + self.server.cut_after])
            return
        self.wfile.write(body[start:])

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(server: Server, target: Path, **options: object) -> Path:
    return fetch(server.url, target, pause_s=0.0, report=lambda line: None, **options)  # type: ignore[arg-type]


def test_fetches_once(server: Server, tmp_path: Path) -> None:
    target = get(server, tmp_path / "deep" / "file.bin")
    assert target.read_bytes() == BODY
    get(server, target)
    assert len(server.requests) == 1
    get(server, target, force=True)
    assert len(server.requests) == 2
    assert [p.name for p in target.parent.iterdir()] == ["file.bin"]


def test_a_cut_transfer_is_continued(server: Server, tmp_path: Path) -> None:
    server.cuts = 1
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests == [None, "bytes=1500000-"]


def test_repeated_cuts_leave_a_part_that_the_next_run_continues(server: Server, tmp_path: Path) -> None:
    server.cuts, server.cut_after = 3, 500_000
    with pytest.raises(DataError, match="3 attempts"):
        get(server, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests[-1] == "bytes=1500000-"


def test_a_part_of_another_version_is_not_continued(server: Server, tmp_path: Path) -> None:
    server.cuts, server.cut_after = 3, 500_000
    with pytest.raises(DataError):
        get(server, tmp_path / "file.bin")
    server.body, server.etag = BODY[::-1], '"v2"'
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY[::-1]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = 1, False
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY


def test_without_a_validator_the_transfer_starts_over(server: Server, tmp_path: Path) -> None:
    server.cuts, server.etag = 1, ""
    assert get(server, tmp_path / "file.bin").read_bytes() == BODY
    assert server.requests == [None, None]


def test_checksums_are_compared(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the checksum is"):
        get(server, tmp_path / "file.bin", sha256="0" * 64)
    assert not (tmp_path / "file.bin").exists()
    get(server, tmp_path / "file.bin", sha256=hashlib.sha256(BODY).hexdigest())


def test_a_refusal_and_an_unreachable_server_are_told_apart(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"answered 404.*by hand"):
        fetch(server.url.replace("file", "missing"), tmp_path / "x", report=print)
    assert len(server.requests) == 1, "a refusal is not tried again"
    with pytest.raises(DataError, match=r"cannot be fetched.*by hand"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", pause_s=0.0, report=print)


def test_enwik8_becomes_one_document_a_page(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [
        "<mediawiki>\n  <siteinfo/>\n",
        "  <page>\n    <title>A</title>\n  </page>\n",
        "  <page>\n  B &amp; é\n  </page>\n",
    ]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("enwik8", "".join(pages))
    server.body = archive.getvalue()
    monkeypatch.setitem(corpora.CORPORA, "enwik8", Corpus("enwik8", (server.url.replace("file.bin", "enwik8.zip"),)))
    (path,) = download("enwik8", tmp_path, report=lambda line: None)
    assert [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()] == pages
    server.body = b"no archive"
    with pytest.raises(DataError, match="not the enwik8 archive"):
        download("enwik8", tmp_path, force=True, report=lambda line: None)


def test_every_listed_corpus_can_be_read() -> None:
    from megatron.common.documents import is_corpus_file

    assert len(corpora.CORPORA) == 19
    for corpus in corpora.CORPORA.values():
        assert corpus.urls
        assert all(is_corpus_file(url.rsplit("/", 1)[1]) for url in corpus.urls)
        assert len({url.rsplit("/", 1)[1] for url in corpus.urls}) == len(corpus.urls)
