"""Storage that is full, read-only, over quota or damaged: one clear word, and what was there before stays."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import Piece, Reader, Retention, Verified, find, save
from megatron.checkpoint.storage import Storage, probe, size
from megatron.common.errors import CheckpointError
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.saving import SPECS, cut, random_tensors, save_with_threads

SPEC = ShardSpec((500,))


def pieces(value: float = 1.0) -> list[Piece]:
    return [Piece.whole("w", "weight", SPEC, torch.full((500,), value))]


class BrokenDisk(Storage):
    """Fails with `code` at the operation `where`, on files whose name holds `name`; has `free` bytes."""

    def __init__(self, code: int, where: str = "write", name: str = "", free: int | None = 10**9) -> None:
        self.code, self.where, self.name, self.free, self.current = code, where, name, free, ""

    def _maybe(self, where: str, name: str) -> None:
        if where == self.where and self.name in name:
            raise OSError(self.code, os.strerror(self.code))

    def make_directory(self, path: Path) -> None:
        self._maybe("make_directory", path.name)
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._maybe("create", path.name)
        self.current = path.name
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._maybe("write", self.current)
        return super().write(fd, data)

    def flush(self, fd: int) -> None:
        self._maybe("flush", self.current)

    def rename(self, source: Path, target: Path) -> None:
        self._maybe("rename", target.name)
        super().rename(source, target)

    def free_bytes(self, path: Path) -> int | None:
        return self.free


@pytest.mark.parametrize(
    ("disk", "told"),
    [
        (BrokenDisk(errno.ENOSPC), r"no space left on the device while writing .*rank_00000.safetensors. "
         r"The checkpoint needs 1\d.\d\d kB; 1.00 GB are free in"),
        (BrokenDisk(errno.ENOSPC, "write", "index"), "no space left on the device while writing .*index.json"),
        (BrokenDisk(errno.ENOSPC, "write", "manifest"), "no space left on the device while writing .*manifest.json"),
        (BrokenDisk(errno.EDQUOT), "the disk quota is exceeded while writing .*The checkpoint needs"),
        (BrokenDisk(errno.EROFS, "make_directory"), "is on a read-only file system"),
        (BrokenDisk(errno.EACCES, "create"), "this user may not write there"),
        (BrokenDisk(errno.EIO, "rename", "global_step2"), "Input/output error"),
        (BrokenDisk(0, "none", free=5000), "the checkpoint needs .* kB and 5.00 kB are free in .*; nothing was"),
    ],
)  # fmt: skip
def test_a_failed_save_says_why_and_leaves_nothing(tmp_path: Path, disk: Storage, told: str) -> None:
    save(tmp_path, 1, pieces(), {})
    with pytest.raises(CheckpointError, match=f"step 2 was not saved in .*{told}.*Earlier checkpoints are untouched"):
        save(tmp_path, 2, pieces(), {}, storage=disk)
    assert find(tmp_path).step == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".global")]
    save(tmp_path, 2, pieces(), {})
    assert find(tmp_path).step == 2


def test_every_rank_hears_of_the_missing_room(tmp_path: Path) -> None:
    dealt = cut(random_tensors(1), SPECS, 2, 3, seed=1)
    for outcome in save_with_threads(tmp_path, 6, dealt, storage=BrokenDisk(0, "none", free=20000)):
        assert isinstance(outcome, CheckpointError)
        assert "20.00 kB are free" in str(outcome)


def test_a_real_limit_on_file_size_is_told(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The kernel itself refuses, in the middle of the tensors."""
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
        with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: File too large"):
            save(tmp_path, 1, pieces(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_write_test(tmp_path: Path) -> None:
    probe(tmp_path / "new" / "run", Storage(), "rank0")
    assert not list((tmp_path / "new" / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"save: checkpoints cannot be written to .*file/run.*another folder"):
        probe(tmp_path / "file" / "run", Storage(), "rank0")
    for where in ("create", "write", "flush", "rename"):
        with pytest.raises(CheckpointError, match="read-only file system"):
            probe(tmp_path, BrokenDisk(errno.EROFS, where), "rank0")
    assert not list(tmp_path.glob(".write_test*"))


def damage(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step")) for path in root.glob("global_step*"))


def test_pruning_counts_only_what_reads_back_whole(tmp_path: Path) -> None:
    keep: dict[str, Any] = {"retention": Retention(keep_last_n=2), "verified": Verified()}
    for step in (1, 2):
        save(tmp_path, step, pieces(step), {}, **keep)
    damage(tmp_path / "global_step2")
    saved = save(tmp_path, 3, pieces(3), {}, **keep)
    assert steps(tmp_path) == [1, 2, 3], "step 1 stays in the place of the damaged step 2"
    (warning,) = saved.warnings
    assert "global_step2/rank_00000.safetensors is damaged" in warning
    assert "tensor w (weight)" in warning
    assert save(tmp_path, 4, pieces(4), {}, **keep).warnings == ()
    assert steps(tmp_path) == [2, 3, 4]
    Reader(tmp_path / "global_step3").verify()


def test_a_new_checkpoint_that_reads_back_damaged_costs_no_older_one(tmp_path: Path) -> None:
    class LyingDisk(Storage):
        def flush(self, fd: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path.name == "rank_00000.safetensors":
                damage(path.parent)

    keep: dict[str, Any] = {"retention": Retention(keep_last_n=1), "verified": Verified()}
    for step in (1, 2):
        save(tmp_path, step, pieces(step), {}, **keep)
    saved = save(tmp_path, 3, pieces(3), {}, storage=LyingDisk(), **keep)
    assert steps(tmp_path) == [1, 2, 3]
    assert "global_step3" in saved.warnings[0]


def test_all_ranks_take_part_in_reading_back(tmp_path: Path) -> None:
    dealt = cut(random_tensors(1), SPECS, 2, 3, seed=1)
    for step in (1, 2):
        save_with_threads(tmp_path, step, dealt)
    shutil.copytree(tmp_path / "global_step1", tmp_path / "kept")
    damage(tmp_path / "global_step2")
    results = save_with_threads(tmp_path, 3, dealt, retention=Retention(keep_last_n=2))
    assert "damaged" in results[0].warnings[0]
    assert steps(tmp_path) == [1, 2, 3]


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_340_000, 10**9, 5 * 10**12)] == [
        "0 bytes", "999 bytes", "1.50 kB", "2.34 MB", "1.00 GB", "5.00 TB",
    ]  # fmt: skip
