"""Checkpoints on what fsspec opens: memory, its view of the local disk, and S3 on the loopback."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from megatron.checkpoint import Piece, Reader, Retention, find, location, open_checkpoint, save
from megatron.checkpoint.location import RemotePath, join_spans
from megatron.checkpoint.object_storage import ObjectStorage
from megatron.checkpoint.storage import probe
from megatron.common.errors import CheckpointError
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.s3_server import S3Server
from tests.unit.checkpoint.saving import KINDS, SPECS, cut, random_tensors, save_with_threads

SPEC = ShardSpec((500,))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield server
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.close()


@pytest.fixture(params=["memory", "local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        return location(f"memory://{uuid.uuid4().hex}/run")
    if request.param == "local":  # in the way of objects, although it could rename
        return RemotePath(fsspec.filesystem("file", auto_mkdir=True), str(tmp_path / "run"), "file")
    request.getfixturevalue("s3")
    return location("s3://bucket/some/run")


def write(root: Any, step: int, value: float, **changes: Any) -> None:
    tensor = torch.full((500,), value)
    save(
        root, step, [Piece.whole("w", "weight", SPEC, tensor)], {"value": value},
        source_files=[("a.yml", f"a: {value}")], rank_tensors={"r": tensor[:3]}, **changes,
    )  # fmt: skip


def loaded(root: Any) -> tuple[int, float]:
    def refuse(note: str) -> None:
        assert "holds no manifest.json" in note or note.startswith("warning: loading"), (
            "only what a stopped save left is worth a word"
        )

    reader = open_checkpoint(root, report=refuse)
    assert reader.source_files() == {"a.yml": f"a: {reader.state['value']}"}
    assert reader.read("w").unique().tolist() == [reader.state["value"]]
    return reader.step, reader.state["value"]


def names(root: Any) -> list[str]:
    return sorted(root.tree())


def test_many_ranks_write_and_any_layout_reads(root: Any) -> None:
    tensors = random_tensors(1)
    for step in (1, 2):
        for result in save_with_threads(root, step, cut(tensors, SPECS, 2, 3, seed=step)):
            assert not isinstance(result, Exception), result
    reader = open_checkpoint(root)
    assert reader.step == 2
    for name in SPECS:
        for kind in KINDS:
            assert torch.equal(reader.read(name, kind), tensors[name, kind])
            flat = SPECS[name].take(tensors[name, kind], 1, 2).reshape(-1)
            assert torch.equal(reader.read_shard(name, kind, 1, 2, 1), flat[1:])
    assert names(root / "global_step2") == ["manifest.json", *(f"rank_0000{rank}.safetensors" for rank in range(3))]
    assert (root / "latest").read_text() == "global_step2"


def test_replacing_a_step_and_pruning(root: Any) -> None:
    for step, value in ((1, 1.0), (2, 2.0), (2, 3.0), (2, 4.0)):
        write(root, step, value)
        assert loaded(root) == (step, value)
    assert names(root / "global_step2") == ["configs-2/a.yml", "manifest.json", "rank_00000-2.safetensors"]
    (root / "global_step9").fs.pipe_file((root / "global_step9" / "other.pt").path, b"another program's")
    for step in (3, 4):
        write(root, step, float(step), retention=Retention(keep_last_n=2))
    assert sorted(path.name for path in root.iterdir()) == ["global_step3", "global_step4", "global_step9", "latest"]


class Killed(BaseException):
    """Not an Exception: a killed process handles nothing."""


class MortalStorage(ObjectStorage):
    """Does so many changes and no more."""

    def __init__(self, operations: int) -> None:
        self.left, self.done = operations, list[str]()

    def _step(self, what: str) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.done.append(what)

    def write_file(self, path: Any, chunks: Any, *, is_lasting: bool = True) -> int:
        self._step(f"write {path.name}")
        return super().write_file(path, chunks)

    def unlink(self, path: Any) -> None:
        self._step(f"unlink {path.name}")
        super().unlink(path)

    def remove_tree(self, path: Any) -> None:
        self._step(f"remove {path.name}")
        super().remove_tree(path)


@pytest.mark.parametrize("step", [18, 15, 20])
def test_killed_after_every_change(step: int) -> None:
    keep = Retention(keep_last_n=2)

    def start() -> Any:
        root = location(f"memory://{uuid.uuid4().hex}/run")
        for old, value in ((10, 1.0), (20, 2.0), (15, 3.0)):
            write(root, old, value, retention=keep)
        return root

    storage = MortalStorage(10**9)
    write(start(), step, 9.0, retention=keep, storage=storage)
    published = storage.done.index("write manifest.json")
    for count in range(len(storage.done)):
        root = start()
        with pytest.raises(Killed):
            write(root, step, 9.0, retention=keep, storage=MortalStorage(count))
        assert loaded(root) == ((step, 9.0) if count > published else (15, 3.0)), storage.done[:count]
        write(root, step, 9.0, retention=keep)
        assert loaded(root) == (step, 9.0)
        left = names(root)
        assert len([name for name in left if name.endswith(".safetensors")]) == 2, left
        assert not [name for name in left if "index" in name or name.startswith(".")], left


def test_refused_changes_on_s3_leave_the_last_good_one(s3: S3Server) -> None:
    write("s3://bucket/run", 1, 1.0)
    before = len(s3.changes)
    write("s3://bucket/probe", 1, 1.0)
    needed = len(s3.changes) - before
    for count in range(needed - 3):  # the last three: manifest, latest, and the end of the marker
        s3.fail_after = len(s3.changes) + count
        with pytest.raises(CheckpointError, match=r"step 2 was not saved in s3://bucket/run: .*may not write"):
            write("s3://bucket/run", 2, 2.0)
        s3.fail_after = None
        assert loaded("s3://bucket/run") == (1, 1.0)
    write("s3://bucket/run", 2, 2.0)
    assert loaded("s3://bucket/run") == (2, 2.0)


def test_damage_is_named_and_passed_over(root: Any) -> None:
    write(root, 1, 1.0)
    write(root, 2, 2.0)
    folder = root / "global_step2"
    for name in ("rank_00000.safetensors", "manifest.json", "configs/a.yml"):
        path = folder / name
        data = path.read_bytes()
        for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], None):
            root.fs.rm_file(path.path) if damaged is None else root.fs.pipe_file(path.path, damaged)
            notes: list[str] = []
            assert open_checkpoint(root, report=notes.append).step == 1
            assert str(folder if name == "manifest.json" and damaged is None else path) in notes[0]
            root.fs.pipe_file(path.path, data)
    assert loaded(root) == (2, 2.0)


def test_only_the_needed_ranges_are_read(s3: S3Server) -> None:
    spec, big = ShardSpec((4096, 512), 0), torch.randn(4096, 512)
    save("s3://bucket/run", 1, [Piece.whole("big", "weight", spec, big)], {})
    reader = Reader("s3://bucket/run/global_step1")
    s3.requests.clear()
    shard = reader.read_shard("big", "weight", 3, 8)
    assert torch.equal(shard.view(512, 512), big[3 * 512 : 4 * 512])
    assert [(method, size) for method, _, size in s3.requests] == [("GET", big.numel() * 4 // 8)]
    # A division of the other dimension: ranges that are close together are one request, others are not.
    for step, columns, requests in ((2, 65536, 1), (3, 262144, 4)):
        values = torch.arange(4.0 * columns)
        save("s3://bucket/run", step, [Piece.whole("wide", "weight", ShardSpec((4, columns), 1), values)], {})
        reader = Reader(f"s3://bucket/run/global_step{step}")
        s3.requests.clear()
        assert torch.equal(reader.read_shard("wide", "weight", 1, 2).view(4, -1), values.view(4, -1)[:, columns // 2 :])
        assert len(s3.requests) == requests
        assert sum(size for _, _, size in s3.requests) <= values.numel() * 4 * (7 / 8 if requests == 1 else 1 / 2)


def test_large_objects_go_in_parts(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.checkpoint.object_storage._PART_BYTES", 5 * 2**20)
    values = torch.arange(3_000_000.0)
    save("s3://bucket/run", 1, [Piece.whole("w", "weight", ShardSpec((3_000_000,)), values)], {})
    assert any(method == "POST" for method, _, _ in s3.requests)
    assert torch.equal(open_checkpoint("s3://bucket/run").read("w"), values)


def test_addresses_that_cannot_be_opened_say_what_to_do(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"nothing://x cannot be opened.*s3://bucket/run"):
        location("nothing://x")
    with pytest.raises(CheckpointError, match=r"s3://bucket/empty does not exist"):
        find("s3://bucket/empty")
    s3.fail_after = 0
    with pytest.raises(CheckpointError, match=r"cannot be written to s3://bucket/run: .*may not write there"):
        probe(location("s3://bucket/run"), ObjectStorage(), "rank0")

    def missing(*arguments: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(CheckpointError, match=r"pip install -r requirements/requirements-s3.txt"):
        location("s3://bucket/run")


def test_the_write_test(root: Any) -> None:
    probe(root, ObjectStorage(), "rank0")
    assert not root.exists() or names(root) == []


def test_file_addresses_are_folders(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/run") == tmp_path / "run"


@pytest.mark.parametrize(
    ("spans", "joined"),
    [
        ([], []),
        ([(5, 9), (0, 2)], [(0, 9)]),
        ([(0, 2), (6, 9), (9, 9), (1, 3)], [(0, 3), (6, 9)]),
    ],
)
def test_close_ranges_become_one(spans: list[tuple[int, int]], joined: list[tuple[int, int]]) -> None:
    assert join_spans(spans, gap=3 if len(spans) == 2 else 2) == joined
