"""Folders that appear whole or not at all.

Invariant: what is written lies beside its place under another name until everything is done, and is gone if it is not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.storage import size
from megatron.common.errors import CheckpointError
from megatron.common.files import fsync_directory


def require_free(output: Path, option: str) -> None:
    """Raises: CheckpointError if something is there already. option: how the command calls the folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Remove it, or choose another {option}.")


@contextmanager
def new_folder(output: Path, option: str, *, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end of the block, or vanishes with an error in it.

    needed_bytes: what is going to be written at least.
    Raises: CheckpointError if `output` is not free, the disk has less room, or it cannot be written to.
    """
    require_free(output, option)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < needed_bytes:
            raise CheckpointError(
                f"{output} needs {size(needed_bytes)} and {size(free)} are free there; nothing was written. Free some "
                f"space, or choose another {option}."
            )
        yield temporary
        fsync_directory(temporary)
        if output.exists():
            output.rmdir()
        os.rename(temporary, output)
        fsync_directory(output.absolute().parent)
    except OSError as error:
        raise CheckpointError(
            f"{output} could not be made: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename else "")
            + f". Nothing was left behind. Free some space, or choose another {option}."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
