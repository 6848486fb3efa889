"""A loopback S3: as much of the protocol as checkpoints use, with objects that appear whole or not at all.

It compares the checksums that clients send, counts requests by kind, and can be told to refuse or to stop listening
after a number of changes. Invariant: nothing is reachable but from this machine.
"""

from __future__ import annotations

import base64
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class S3Server(ThreadingHTTPServer):
    """objects: by "bucket/key". changes: one line per accepted change. fail_after: changes that are accepted, or None.

    requests: (method, key, bytes sent back) of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.changes: list[str] = []
        self.requests: list[tuple[str, str, int]] = []
        self.fail_after: int | None = None
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()
        self._thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    disable_nagle_algorithm = True
    server: S3Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def handle_expect_100(self) -> bool:
        """The client sends its body only after this."""
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def _where(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return unquote(parts.path).lstrip("/"), query

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        key, _ = self._where()
        self.server.requests.append((self.command, key, len(body)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _body(self) -> bytes | None:
        """The request's body; None (and an answer) if its checksum does not fit or changes are refused."""
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        told = self.headers.get("x-amz-checksum-crc32")
        if told is not None and base64.b64decode(told) != zlib.crc32(body).to_bytes(4, "big"):
            self._error(400, "BadDigest")
            return None
        return body

    def _may_change(self, what: str) -> bool:
        with self.server.lock:
            limit = self.server.fail_after
            if limit is not None and len(self.server.changes) >= limit:
                allowed = False
            else:
                self.server.changes.append(what)
                allowed = True
        if not allowed:
            self._error(403, "AccessDenied")
        return allowed

    def do_HEAD(self) -> None:
        key, _ = self._where()
        if "/" not in key.rstrip("/"):
            self._answer(200)
        elif key in self.server.objects:
            data = self.server.objects[key]
            self._answer(200, Content_Length=str(len(data)), ETag=f'"{zlib.crc32(data):08x}"')
        else:
            self._answer(404)

    def do_GET(self) -> None:
        key, query = self._where()
        if "/" not in key.rstrip("/"):
            self._list(key.rstrip("/"), query)
            return
        if key not in self.server.objects:
            self._error(404, "NoSuchKey")
            return
        data = self.server.objects[key]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data, ETag='"whole"')
            return
        start, last = int(wanted.group(1)), min(int(wanted.group(2)), len(data) - 1)
        self._answer(206, data[start : last + 1], Content_Range=f"bytes {start}-{last}/{len(data)}")

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        contents, folders = [], set()
        for path in sorted(self.server.objects):
            if not path.startswith(f"{bucket}/{prefix}"):
                continue
            key = path[len(bucket) + 1 :]
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                size = len(self.server.objects[path])
                contents.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>x</ETag>"
                    "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        self._answer(
            200,
            f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(contents) + len(folders)}</KeyCount>{''.join(contents)}{common}"
            "</ListBucketResult>".encode(),
            Content_Type="application/xml",
        )

    def do_PUT(self) -> None:
        (key, query), body = self._where(), self._body()
        if body is None:
            return
        if "uploadId" in query:
            with self.server.lock:
                self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._answer(200, ETag=f'"{zlib.crc32(body):08x}"')
        elif self._may_change(f"put {key}"):
            self.server.objects[key] = body
            self._answer(200, ETag=f'"{zlib.crc32(body):08x}"')

    def do_POST(self) -> None:
        (key, query), body = self._where(), self._body()
        if body is None:
            return
        if "uploads" in query:
            with self.server.lock:
                upload = f"u{len(self.server.uploads)}"
                self.server.uploads[upload] = {}
            self._answer(
                200,
                f"<InitiateMultipartUploadResult><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
                "</InitiateMultipartUploadResult>".encode(),
            )
        elif "uploadId" in query:
            if self._may_change(f"put {key}"):
                parts = self.server.uploads.pop(query["uploadId"])
                self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
                self._answer(200, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")
        elif "delete" in query:
            names = [node.text or "" for node in ElementTree.fromstring(body).iter() if node.tag.endswith("Key")]
            if self._may_change(f"delete {' '.join(names)}"):
                for name in names:
                    self.server.objects.pop(f"{key.rstrip('/')}/{name}", None)
                self._answer(200, b"<DeleteResult></DeleteResult>")
        else:
            self._error(400, "InvalidRequest")

    def do_DELETE(self) -> None:
        key, query = self._where()
        if "uploadId" in query:
            self.server.uploads.pop(query["uploadId"], None)
            self._answer(204)
        elif self._may_change(f"delete {key}"):
            self.server.objects.pop(key, None)
            self._answer(204)
