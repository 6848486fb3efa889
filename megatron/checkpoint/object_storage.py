"""The operations of a save on what fsspec opens: objects that appear whole or not at all.

Invariant: an object that `write_file` did not finish is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from megatron.checkpoint.location import remote_error
from megatron.checkpoint.storage import Address, Storage
from megatron.common.errors import CheckpointError

# Parts of a multipart upload: S3 allows 10,000 of them, so a rank may write 640 GB.
_PART_BYTES = 1 << 26


class ObjectStorage(Storage):
    """Storage without folders, renames and appends. `latest` and the like are replaced in one request."""

    def make_directory(self, path: Address) -> None:
        """Nothing: a prefix exists as soon as something lies below it."""

    def flush_directory(self, path: Address) -> None:
        """Nothing: an object that was accepted is there to stay."""

    def write_file(self, path: Address, chunks: Iterable[bytes | memoryview], *, is_lasting: bool = True) -> int:
        """Send the chunks as one object; return the number of bytes. Raises: OSError that names the address."""
        total = 0
        stream = path.call("open", "wb", block_size=_PART_BYTES)
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                total += len(view)
                for begin in range(0, len(view), _PART_BYTES):
                    stream.write(view[begin : begin + _PART_BYTES])
            stream.close()
        except BaseException as error:
            # Closing would send what there is as if it were all.
            with contextlib.suppress(Exception):
                stream.discard()
            with contextlib.suppress(Exception):
                stream.closed = True
            if isinstance(error, CheckpointError) or not isinstance(error, Exception):
                raise
            raise remote_error(error, path) from error
        return total

    def replace_text(self, path: Address, text: str, *, is_lasting: bool = True) -> None:
        """Give the object new content in one request."""
        self.write_file(path, [text.encode()])

    def rename(self, source: Address, target: Address) -> None:
        """Copy, then remove: only the write test does it."""
        self.write_file(target, [source.read_bytes()])
        self.unlink(source)

    def unlink(self, path: Address) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            path.call("rm_file")

    def remove_tree(self, path: Address) -> None:
        """Remove all objects below the address."""
        with contextlib.suppress(FileNotFoundError):
            path.call("rm", recursive=True)

    def free_bytes(self, path: Address) -> int | None:
        """Not known."""
        return None
