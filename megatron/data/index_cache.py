"""Keep index arrays on disk, so that a second start maps them instead of building them.

A file's name carries a hash of everything its content depends on, so a stale file cannot be picked up: upstream's names
leave out the split and the data. Knows nothing about what the arrays mean.
Invariant: an array under its final name is complete; any number of processes may ask for it at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron.common.errors import DataError
from megatron.common.files import atomic_write
from megatron.common.heartbeat import busy

logger = logging.getLogger(__name__)


def content_key(*parts: object) -> str:
    """A hash of the values that decide an index's content."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def cached_arrays(
    prefix: str, stem: str, key: str, names: Sequence[str], build: Callable[[], Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """The arrays `names` of the index `stem`, memory-mapped; built by `build` when they are not there yet.

    They lie beside `prefix` as `{prefix}_{stem}_{key}_{name}.npy`, or, where that folder cannot be written, in the
    user's cache folder (`MEGATRON_CACHE_DIR`, else `XDG_CACHE_HOME/megatron`, else `~/.cache/megatron`), which is
    said once. One process builds, the others on the same file system wait for it.
    """
    beside = Path(prefix).absolute()
    folders = [beside.parent, user_cache_folder()]
    for folder in folders:
        files = _file_names(folder, beside.name, stem, key, names)
        if all(file.is_file() for file in files):
            return _map_all(files)
    for folder in folders:
        files = _file_names(folder, beside.name, stem, key, names)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(files[0].with_suffix(".lock")):
                if not all(file.is_file() for file in files):
                    # A single call of NumPy may take many minutes here.
                    with busy():
                        _write_all(files, build())
            return _map_all(files)
        except OSError as error:
            if folder != folders[-1]:
                logger.warning(
                    "index of %s: %s cannot be written (%s); using %s", prefix, folder, error.strerror, folders[-1]
                )
                continue
            raise DataError(
                f"the index of {prefix} can be written neither to {folders[0]} nor to {folder} ({error}). "
                "Set MEGATRON_CACHE_DIR to a folder that can be written."
            ) from error
    raise AssertionError("unreachable: the last folder returns or raises")


def user_cache_folder() -> Path:
    """Where index arrays of read-only data are kept."""
    if folder := os.environ.get("MEGATRON_CACHE_DIR"):
        return Path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron"


def _file_names(folder: Path, base: str, stem: str, key: str, names: Sequence[str]) -> list[Path]:
    return [folder / f"{base}_{stem}_{key[:16]}_{name}.npy" for name in names]


def _write_all(files: Sequence[Path], arrays: Sequence[np.ndarray]) -> None:
    for file, array in zip(files, arrays, strict=True):
        with atomic_write(file, "wb") as stream:
            np.save(stream, array, allow_pickle=False)


def _map_all(files: Sequence[Path]) -> list[np.ndarray]:
    arrays = []
    for file in files:
        try:
            # A plain array over the mapping: indexing the memmap subclass itself is several times slower.
            arrays.append(np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)))
        except ValueError as error:
            raise DataError(f"{file} is damaged ({error}). Delete it; it will be built again.") from error
    return arrays


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; where the file system has none, go on without: writes are atomic and equal anyway."""
    with open(path, "a") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
