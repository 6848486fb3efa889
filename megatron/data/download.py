"""Fetch files over HTTP: resumed after an interruption, checked, and published by one rename.

Invariant: a file under its final name is complete.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from megatron.common.errors import DataError

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 3


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    force: bool = False,
    timeout_s: float = 60.0,
    pause_s: float = 2.0,
    report: Callable[[str], None] = print,
) -> Path:
    """Bring `url` to `target`; what is there already is kept unless `force`.

    A cut-off transfer stays as `.{name}.part` and is continued by the next call, provided the server says (by its
    ETag or date) that the file is still the same one.

    Raises: DataError when the server cannot be reached, refuses, keeps cutting the transfer, or the checksum is
    another.
    """
    if target.is_file() and not force:
        report(f"{target} is there already")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, validator_file = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.etag")
    if force:
        part.unlink(missing_ok=True)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _transfer(url, part, validator_file, timeout_s, report)
            break
        except urllib.error.HTTPError as error:
            raise DataError(f"{url}: the server answered {error.code} {error.reason}. {_by_hand(target)}") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == _ATTEMPTS:
                reason = getattr(error, "reason", None) or error
                raise DataError(
                    f"{url} cannot be fetched ({reason}; {_ATTEMPTS} attempts). Run the same command again to "
                    f"continue, or without network: {_by_hand(target)}"
                ) from error
            time.sleep(pause_s * attempt)
    if sha256 is not None and (found := file_sha256(part)) != sha256:
        part.unlink()
        raise DataError(
            f"{url}: the checksum is {found}, required is {sha256}: the file is not the expected one. Fetch again."
        )
    os.replace(part, target)
    validator_file.unlink(missing_ok=True)
    return target


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _by_hand(target: Path) -> str:
    return f"Put the file at {target} by hand, then run the same command again."


def _transfer(url: str, part: Path, validator_file: Path, timeout_s: float, report: Callable[[str], None]) -> None:
    have = part.stat().st_size if part.is_file() else 0
    validator = validator_file.read_text() if validator_file.is_file() else ""
    request = urllib.request.Request(url, headers={"User-Agent": "megatron-prepare-data"})
    if have and validator:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            have = 0
            validator_file.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        length = response.headers.get("Content-Length")
        expected = have + int(length) if length is not None else None
        size = f"{expected / 1e6:,.1f} MB" if expected is not None else "unknown size"
        report(f"{url} -> {part.parent} ({size}{f', continuing at {have / 1e6:,.1f} MB' if resumed else ''})")
        with open(part, "ab" if resumed else "wb") as stream:
            while chunk := response.read(_CHUNK_BYTES):
                stream.write(chunk)
                have += len(chunk)
            stream.flush()
            os.fsync(stream.fileno())
    if expected is not None and have != expected:
        raise ConnectionError(f"the connection ended after {have:,} of {expected:,} bytes")
