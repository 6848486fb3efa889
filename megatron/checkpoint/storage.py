"""The few file operations from which a save is built, one method each, and words for those that fail.

It does not know what is written. Every operation that changes the disk goes through one of the primitives, so that a
test can stop the world after any of them. Invariant: `write_file` returns only when the bytes are on the disk,
unless told that they need not be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.common.errors import CheckpointError

# A Path here, a RemotePath in ObjectStorage: each kind of storage takes its own.
Address = Any
# A file is flushed in portions: how long one flush takes is then bounded, and between two the watchdog sees progress.
_FLUSH_BYTES = 1 << 30


class Storage:
    """A local (or mounted) file system."""

    # --- primitives: all that ever changes the disk ---

    def make_directory(self, path: Address) -> None:
        """Make `path` and its parents; existing ones are fine."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Address) -> int:
        """Open `path` for writing from scratch."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some leading bytes of `data`; return how many."""
        return os.write(fd, data)

    def flush(self, fd: int) -> None:
        """Force a file's or a directory's content to the disk."""
        os.fsync(fd)

    def rename(self, source: Address, target: Address) -> None:
        """Move within the file system in one step."""
        os.rename(source, target)

    def unlink(self, path: Address) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Address) -> None:
        """Remove a folder with all that is in it."""
        shutil.rmtree(path)

    # --- built from them ---

    def flush_directory(self, path: Address) -> None:
        """Force a directory's entries to the disk, so that creations and renames in it survive a power cut."""
        fd = os.open(path, os.O_RDONLY)
        try:
            self.flush(fd)
        finally:
            os.close(fd)

    def write_file(self, path: Address, chunks: Iterable[bytes | memoryview], *, is_lasting: bool = True) -> int:
        """Write the chunks one after the other and flush; return the number of bytes.

        is_lasting: false leaves out the flush, for a file whose loss in a power cut does no harm.
        Raises: OSError that names the file.
        """
        total = unflushed = 0
        with naming(path):
            fd = self.create(path)
            try:
                for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    total += len(view)
                    while len(view):
                        written = self.write(fd, view)
                        view, unflushed = view[written:], unflushed + written
                    if is_lasting and unflushed >= _FLUSH_BYTES:
                        self.flush(fd)
                        unflushed = 0
                if is_lasting:
                    self.flush(fd)
            finally:
                os.close(fd)
        return total

    def replace_text(self, path: Address, text: str, *, is_lasting: bool = True) -> None:
        """Give the file `path` new content in one step. is_lasting: as in `write_file`."""
        temporary = path.with_name(f".{path.name}.tmp")
        self.write_file(temporary, [text.encode()], is_lasting=is_lasting)
        self.rename(temporary, path)
        if is_lasting:
            self.flush_directory(path.parent)

    # --- what it knows ---

    def free_bytes(self, path: Address) -> int | None:
        """Room left in the file system of `path` for this user; None where it is not known. Quotas are not seen."""
        with contextlib.suppress(OSError):
            return shutil.disk_usage(path).free
        return None


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Give an OSError that names no file the name of this one: `write` and `fsync` know only a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def explain(error: OSError, disk: Storage, root: Address, needed_bytes: int | None = None) -> str:
    """What an OSError of a save means, in words, with the room needed and left."""
    where = error.filename or root
    need = "" if needed_bytes is None else f" The checkpoint needs {size(needed_bytes)};"
    free = disk.free_bytes(root)
    room = "" if free is None else f" {size(free)} are free in {root} now."
    if error.errno == errno.ENOSPC:
        return f"no space left on the device while writing {where}.{need}{room}"
    if error.errno == errno.EDQUOT:
        return f"the disk quota is exceeded while writing {where}.{need} ask for more, or remove old checkpoints."
    if error.errno == errno.EROFS:
        return f"{where} is on a read-only file system"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{where}: this user may not write there"
    return f"{where}: {error.strerror or error}"


def probe(root: Address, disk: Storage, mark: str) -> None:
    """Write, flush, rename and remove a small file under `root`, as a save does; `mark` makes its name this rank's own.

    Raises: CheckpointError that says what to mend.
    """
    trial, before = root / f".write_test.{mark}", root / f".write_test.{mark}.tmp"
    try:
        disk.make_directory(root)
        disk.write_file(before, [b"write test"])
        disk.rename(before, trial)
        disk.flush_directory(root)
        if trial.read_bytes() != b"write test":
            raise CheckpointError(f"save: {root} does not give back what was written. Mend the storage.")
        disk.unlink(trial)
    except OSError as error:
        with contextlib.suppress(OSError):
            disk.unlink(before)
        raise CheckpointError(
            f"save: checkpoints cannot be written to {root}: {explain(error, disk, root)}. "
            "Mend that, or set save to another folder."
        ) from error


def size(num_bytes: int) -> str:
    """A size for people, in decimal units as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} bytes"
