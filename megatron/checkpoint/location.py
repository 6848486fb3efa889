"""Where checkpoints lie: a folder of this machine, or an address such as s3://bucket/run that fsspec opens.

`location` gives a `Path` or a `RemotePath`, which answers to the same few methods as far as finding and reading need
them. Nothing is written here. Invariant: whatever goes wrong with remote storage comes up as an OSError that names the
address.
"""

from __future__ import annotations

import errno
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron.common.errors import CheckpointError

# Ranges closer together than this are fetched in one request: a request costs about as much as these bytes.
_GAP_BYTES = 1 << 18
_REQUIREMENTS = {"s3": "requirements-s3.txt", "s3a": "requirements-s3.txt"}


@dataclass(frozen=True)
class Stat:
    """What `stat` says of an object."""

    st_size: int


class RemotePath:
    """One address in a file system of fsspec. `scheme` is what stands before `://`."""

    def __init__(self, fs: Any, path: str, scheme: str) -> None:
        self.fs, self.path, self.scheme = fs, path.rstrip("/") or "/", scheme

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(self.fs, f"{self.path.rstrip('/')}/{name}", self.scheme)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path.lstrip('/') if self.scheme != 'file' else self.path}"

    __repr__ = __str__

    def __lt__(self, other: RemotePath) -> bool:
        return self.path < other.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> RemotePath:
        """The address without its last part."""
        return RemotePath(self.fs, self.path.rsplit("/", 1)[0], self.scheme)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of the file system on this address. Raises: OSError, whatever the library raised."""
        try:
            return getattr(self.fs, method)(self.path, *arguments, **options)
        except Exception as error:
            raise remote_error(error, self) from error

    def exists(self) -> bool:
        """Whether there is an object, or a folder with something in it."""
        return bool(self.call("exists"))

    def is_dir(self) -> bool:
        """Whether there is anything below the address."""
        return bool(self.call("isdir"))

    def is_file(self) -> bool:
        """Whether there is an object."""
        return bool(self.call("isfile"))

    def stat(self) -> Stat:
        """The object's size."""
        return Stat(int(self.call("size")))

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below."""
        self.fs.invalidate_cache()
        for path in self.call("ls", detail=False):
            name = path.rstrip("/").rsplit("/", 1)[-1]
            if name != self.name:
                yield self / name

    def tree(self) -> dict[str, int]:
        """Sizes of all objects below, by their path from here."""
        self.fs.invalidate_cache()
        found = self.call("find", detail=True)
        start = len(self.path.rstrip("/")) + 1
        return {path[start:]: int(entry["size"]) for path, entry in found.items()}

    def read_bytes(self) -> bytes:
        """The whole object."""
        data: bytes = self.call("cat_file")
        return data

    def read_text(self) -> str:
        """The whole object as UTF-8."""
        return self.read_bytes().decode()

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object. Raises: OSError if it has fewer."""
        data: bytes = self.call("cat_file", start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} bytes came instead of {stop - start}", str(self))
        return data


def remote_error(error: Exception, path: RemotePath) -> OSError:
    """What the library raised, as an OSError with a number and the address."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "not found", str(path))
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, str(error), str(path))
    if isinstance(error, OSError):
        return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))
    # Libraries below have error families of their own (no credentials, no connection).
    return OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path))


Location = Path | RemotePath


def is_remote(address: object) -> bool:
    """Whether an address names storage that is not a folder of this machine."""
    return isinstance(address, RemotePath) or ("://" in str(address) and not str(address).startswith("file://"))


def local_folder(address: str | None) -> Path | None:
    """The address as a folder of this machine, None where there is none or it is elsewhere."""
    return None if address is None or is_remote(address) else Path(address.removeprefix("file://"))


def location(address: str | Location) -> Location:
    """Open an address. `file://` is a folder of this machine like any other.

    Raises: CheckpointError if the address cannot be opened here, naming what is missing.
    """
    if isinstance(address, Path | RemotePath):
        return address
    if not is_remote(address):
        return Path(address.removeprefix("file://"))
    scheme = address.split("://", 1)[0]
    try:
        fsspec = importlib.import_module("fsspec.core")
        fs, path = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        needed = _REQUIREMENTS.get(scheme)
        what = f"pip install -r requirements/{needed}" if needed else f"install what fsspec needs for {scheme}://"
        raise CheckpointError(f"{address} cannot be opened: {error}. Run: {what}") from error
    except Exception as error:
        raise CheckpointError(
            f"{address} cannot be opened: {error}. Give a folder, or an address of fsspec such as s3://bucket/run."
        ) from error
    return RemotePath(fs, path, scheme)


def file_sizes(folder: Location, names: Sequence[str]) -> dict[str, int]:
    """Sizes of those of the named files that are there: one listing where every question costs a request."""
    if isinstance(folder, RemotePath):
        return folder.tree()
    found = {}
    for name in names:
        try:
            found[name] = (folder / name).stat().st_size
        except OSError:
            continue
    return found


class ByteSource:
    """Reads ranges of one file of known size: mapped where it lies on this machine, fetched otherwise."""

    def __init__(self, path: Location, total: int) -> None:
        self.path = path
        self._mapped: torch.Tensor | None = None
        if isinstance(path, Path):
            # A mapping of a file that was cut short would end the process: the caller has checked its size.
            self._mapped = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)

    def read(self, offset: int, size: int) -> torch.Tensor:
        """Bytes [offset, offset + size), not to be written to."""
        if self._mapped is not None:
            return self._mapped[offset : offset + size]
        return self._fetch(lambda path: path.read_range(offset, offset + size) if size else b"")

    def read_spans(self, offset: int, size: int, spans: Iterable[tuple[int, int]]) -> torch.Tensor:
        """`size` bytes from `offset` of which only the given [start, stop) are asked for; others may be anything."""
        if self._mapped is not None:
            return self._mapped[offset : offset + size]
        target = torch.empty(size, dtype=torch.uint8)  # pages that nothing is written to cost no memory
        for start, stop in join_spans(spans):
            target[start:stop] = self.read(offset + start, stop - start)
        return target

    def _fetch(self, request: Callable[[RemotePath], bytes]) -> torch.Tensor:
        assert isinstance(self.path, RemotePath)
        try:
            data = request(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def join_spans(spans: Iterable[tuple[int, int]], gap: int = _GAP_BYTES) -> list[tuple[int, int]]:
    """The spans in order, those that are at most `gap` apart made one."""
    joined: list[tuple[int, int]] = []
    last = -math.inf
    for start, stop in sorted(spans):
        if start - last <= gap:
            last = max(last, stop)
            joined[-1] = (joined[-1][0], int(last))
        else:
            joined.append((start, stop))
            last = stop
    return joined
