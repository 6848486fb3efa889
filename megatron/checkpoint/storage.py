"""The few file operations from which a save is built, one method each.

It does not know what is written. Every operation that changes the disk goes through one of the primitives, so that a
test can stop the world after any of them. Invariant: `write_file` returns only when the bytes are on the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class Storage:
    """A local (or mounted) file system."""

    # --- primitives: all that ever changes the disk ---

    def make_directory(self, path: Path) -> None:
        """Make `path` and its parents; existing ones are fine."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """Open `path` for writing from scratch."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some leading bytes of `data`; return how many."""
        return os.write(fd, data)

    def flush(self, fd: int) -> None:
        """Force a file's or a directory's content to the disk."""
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Move within the file system in one step."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it."""
        shutil.rmtree(path)

    # --- built from them ---

    def flush_directory(self, path: Path) -> None:
        """Force a directory's entries to the disk, so that creations and renames in it survive a power cut."""
        fd = os.open(path, os.O_RDONLY)
        try:
            self.flush(fd)
        finally:
            os.close(fd)

    def write_file(self, path: Path, chunks: Iterable[bytes | memoryview]) -> int:
        """Write the chunks one after the other and flush; return the number of bytes."""
        total = 0
        fd = self.create(path)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                total += len(view)
                while len(view):
                    view = view[self.write(fd, view) :]
            self.flush(fd)
        finally:
            os.close(fd)
        return total

    def replace_text(self, path: Path, text: str) -> None:
        """Give the file `path` new content in one step."""
        temporary = path.with_name(f".{path.name}.tmp")
        self.write_file(temporary, [text.encode()])
        self.rename(temporary, path)
        self.flush_directory(path.parent)
