"""A save that is killed after any of its file operations leaves a folder from which the right checkpoint loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import Piece, Retention, open_checkpoint, save
from megatron.checkpoint.storage import Storage
from megatron.parallel.sharding import ShardSpec

SPEC = ShardSpec((50,))


class Killed(BaseException):
    """Not an Exception: a killed process handles nothing."""


class MortalStorage(Storage):
    """Does `operations` file operations, half of the next one if it is a write or a removal, and nothing more."""

    def __init__(self, operations: int) -> None:
        self.left = operations
        self.done: list[str] = []

    def _live(self, what: str) -> bool:
        self.left -= 1
        if self.left < -1:
            raise Killed
        self.done.append(what)
        return self.left >= 0

    def _step(self, what: str) -> None:
        if not self._live(what):
            raise Killed

    def make_directory(self, path: Path) -> None:
        self._step("make_directory")
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._step(f"create {path.name}")
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        if not self._live("write"):
            super().write(fd, data[: len(data) // 2])
            raise Killed
        return super().write(fd, data)

    def flush(self, fd: int) -> None:
        self._step("flush")

    def rename(self, source: Path, target: Path) -> None:
        self._step(f"rename to {target.name}")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step(f"unlink {path.name}")
        super().unlink(path)

    def remove_tree(self, path: Path) -> None:
        if not self._live(f"remove {path.name}"):
            next(file for file in sorted(path.rglob("*")) if file.is_file()).unlink()
            raise Killed
        super().remove_tree(path)


def write(root: Path, step: int, value: float, storage: Storage | None = None) -> None:
    tensor = torch.full((50,), value)
    save(
        root, step, [Piece.whole("w", "weight", SPEC, tensor)], {"value": value}, storage=storage,
        retention=Retention(keep_last_n=2), source_files=[("a.yml", "a: 1")], rank_tensors={"r": tensor},
    )  # fmt: skip


def loaded(root: Path) -> tuple[int, float]:
    def refuse(note: str) -> None:
        raise AssertionError(f"nothing of what a killed save leaves is worth a warning: {note}")

    reader = open_checkpoint(root, report=refuse)
    values = reader.read("w").unique().tolist()
    assert values == [reader.state["value"]]
    return reader.step, values[0]


def operations_of(root: Path, step: int) -> list[str]:
    storage = MortalStorage(10**9)
    write(root, step, 9.0, storage)
    return storage.done


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Three checkpoints, the third one rolled back to step 15, and the rest of an earlier killed save."""
    root = tmp_path / "start"
    for step, value in ((10, 1.0), (20, 2.0), (15, 3.0)):
        write(root, step, value)
    (root / ".global_step7.tmp").mkdir()
    (root / ".global_step7.tmp" / "rank_00000.safetensors").write_bytes(b"half")
    return root


@pytest.mark.parametrize("step", [18, 15, 20])
def test_killed_after_every_operation(tmp_path: Path, start: Path, step: int) -> None:
    root = tmp_path / "run"
    shutil.copytree(start, root)
    operations = operations_of(root, step)
    assert loaded(root) == (step, 9.0)
    published = operations.index(f"rename to global_step{step}")
    assert len(operations) > 20
    for count in range(len(operations)):
        shutil.rmtree(root)
        shutil.copytree(start, root)
        with pytest.raises(Killed):
            write(root, step, 9.0, MortalStorage(count))
        expected = (step, 9.0) if count > published else (15, 3.0)
        assert loaded(root) == expected, f"killed after {count} operations: {operations[:count]}"
        write(root, step, 9.0)
        assert loaded(root) == (step, 9.0)
        left = {path.name for path in root.iterdir()}
        assert not {name for name in left if name.startswith(".") or name.endswith(".replaced")}, left


def test_a_rollback_by_hand_is_followed(start: Path) -> None:
    assert loaded(start) == (15, 3.0)
    (start / "latest").write_text("global_step20")
    notes: list[str] = []
    assert open_checkpoint(start, report=notes.append).step == 20
    assert "global_step15 was written later" in notes[0]
