"""Index arrays on disk: built once, never stale, never half-written, also where the data folder is read-only."""

import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.common.errors import DataError
from megatron.data import index_cache
from megatron.data.index_cache import cached_arrays, content_key


def build_slowly(folder: str, delay_s: float) -> list[np.ndarray]:
    (Path(folder) / f"built-{time.monotonic_ns()}").touch()
    time.sleep(delay_s)
    return [np.arange(5), np.arange(3.0)]


def ask(folder: str) -> float:
    arrays = cached_arrays(f"{folder}/d", "train", "0" * 32, ("a", "b"), lambda: build_slowly(folder, 0.5))
    return float(arrays[0].sum() + arrays[1].sum())


def never() -> list[np.ndarray]:
    raise AssertionError("built again")


def test_built_once_then_mapped(tmp_path: Path) -> None:
    assert ask(str(tmp_path)) == 13.0
    arrays = cached_arrays(f"{tmp_path}/d", "train", "0" * 32, ("a", "b"), never)
    assert [a.tolist() for a in arrays] == [[0, 1, 2, 3, 4], [0.0, 1.0, 2.0]]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("built")) == [
        f"d_train_{'0' * 16}_a.npy",
        f"d_train_{'0' * 16}_b.npy",
    ]


def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        assert pool.map(ask, [str(tmp_path)] * 3, chunksize=1) == [13.0] * 3
        # Else the workers are killed, and with bad luck what they share stays in /dev/shm.
        pool.close()
        pool.join()
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_keys_tell_contents_apart() -> None:
    assert content_key("a", 1, None) == content_key("a", 1, None)
    assert len({content_key("a", 1), content_key("a", "1"), content_key("a1"), content_key("a", 2)}) == 4


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder that refuses writes (by permission bits it would not, for root)."""
    data = tmp_path / "data"
    data.mkdir()
    write: Callable[..., None] = index_cache._write_all

    def refuse(files: list[Path], arrays: list[np.ndarray]) -> None:
        if files[0].parent == data:
            raise PermissionError(13, "Permission denied")
        write(files, arrays)

    monkeypatch.setattr(index_cache, "_write_all", refuse)
    monkeypatch.setenv("MEGATRON_CACHE_DIR", str(tmp_path / "cache"))
    return data


def test_read_only_data_uses_the_cache_folder_and_says_so(read_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        arrays = cached_arrays(f"{read_only}/d", "train", "1" * 32, ("a",), lambda: [np.arange(4)])
    assert arrays[0].tolist() == [0, 1, 2, 3]
    assert "cannot be written (Permission denied)" in caplog.text
    assert str(read_only.parent / "cache") in caplog.text
    assert list(read_only.iterdir()) == []
    assert cached_arrays(f"{read_only}/d", "train", "1" * 32, ("a",), never)[0].tolist() == [0, 1, 2, 3]


def test_nowhere_to_write_is_an_error(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (read_only.parent / "file").touch()
    monkeypatch.setenv("MEGATRON_CACHE_DIR", str(read_only.parent / "file" / "x"))
    with pytest.raises(DataError, match="MEGATRON_CACHE_DIR"):
        cached_arrays(f"{read_only}/d", "train", "1" * 32, ("a",), lambda: [np.arange(4)])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    ask(str(tmp_path))
    file = tmp_path / f"d_train_{'0' * 16}_a.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"_a\.npy is damaged"):
        ask(str(tmp_path))
