"""What a save refuses, keeps and removes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint import Piece, Reader, Retention, find, open_checkpoint, save
from megatron.checkpoint.storage import Storage
from megatron.common.errors import CheckpointError
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.saving import SPECS, cut, random_tensors, save_with_threads

SPEC = ShardSpec((6, 3), 0)


def piece(value: float = 1.0, **changes: Any) -> Piece:
    fields = {"name": "w", "kind": "weight", "spec": SPEC, "tp_rank": 0, "tp_size": 1, "start": 0, "stop": 18}
    fields |= changes
    return Piece(tensor=torch.full((fields["stop"] - fields["start"],), value), **fields)  # type: ignore[arg-type]


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step")) for path in root.glob("global_step*"))


def test_folder_is_what_it_promises(tmp_path: Path) -> None:
    saved = save(tmp_path, 40, [piece()], {"samples": 3}, source_files=[("a.yml", "k: ü\n")], rank_tensors={})
    assert saved.folder == tmp_path / "global_step40"
    assert (tmp_path / "latest").read_text() == "global_step40"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step40", "latest"]
    names = sorted(str(path.relative_to(saved.folder)) for path in saved.folder.rglob("*"))
    assert names == ["configs", "configs/a.yml", "manifest.json", "rank_00000.safetensors"]
    assert (saved.folder / "configs/a.yml").read_text() == "k: ü\n"
    # Any JSON and any safetensors reader can open it.
    assert json.loads((saved.folder / "manifest.json").read_text())["step"] == 40
    (tensor,) = load_file(saved.folder / "rank_00000.safetensors").values()
    assert tensor.tolist() == [1.0] * 18
    assert Reader(saved.folder).state == {"samples": 3}
    assert Reader(saved.folder).source_files() == {"a.yml": "k: ü\n"}


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([piece(stop=17)], "w (weight): elements 17 to 18 of shard 0 of 1 are missing"),
        ([piece(), piece(start=3, stop=4)], "w (weight): elements 3 to 4 of shard 0 of 1 came twice"),
        ([piece(tp_size=2, stop=9)], "w (weight): elements 0 to 9 of shard 1 of 2 are missing"),
        ([piece(kind="exp_avg")], "w: exp_avg given without its weight"),
        ([piece(), piece(name="v")], "v: not part of the model"),
        ([piece(name="v")], "w: no rank gave it"),
        ([piece(stop=9), piece(start=9, spec=ShardSpec((18,), 0))], "w (weight): ranks give different shapes"),
        ([piece(stop=19)], "the shard has 18 elements"),
        ([piece(), piece()], "twice"),
    ],
)
def test_pieces_must_make_up_the_model(tmp_path: Path, pieces: list[Piece], told: str) -> None:
    save(tmp_path, 1, [piece()], {})
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, pieces, {}, expected_names=["w"])
    assert told in str(caught.value)
    assert find(tmp_path).step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_replicas_are_compared_and_not_written(tmp_path: Path) -> None:
    spec = ShardSpec((4,))
    first, same, other = torch.ones(4), torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0])
    dealt = [
        [Piece.whole(name, "weight", spec, tensor, tp_rank, 2) for name, tensor in tensors.items()]
        for tp_rank, tensors in enumerate([{"a": first, "b": first}, {"a": same, "b": other}])
    ]
    results = save_with_threads(tmp_path, 1, dealt)
    assert results[0].differing_replicas == ("b",)
    reader = Reader(tmp_path / "global_step1")
    assert torch.equal(reader.read("b"), first)
    assert list(load_file(reader.folder / "rank_00001.safetensors")) == ["rank/1/number"]


class FailingDisk(Storage):
    """A disk without room for one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failing: set[int] = set()

    def create(self, path: Path) -> int:
        fd = super().create(path)
        if path.name == self.name:
            self.failing.add(fd)
        else:
            self.failing.discard(fd)
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        if fd in self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


@pytest.mark.parametrize("name", ["rank_00001.safetensors", "rank_00000.index.json", "manifest.json"])
def test_all_ranks_learn_of_one_rank_s_failure(tmp_path: Path, name: str) -> None:
    dealt = cut(random_tensors(1), SPECS, 2, 3, seed=1)
    save_with_threads(tmp_path, 5, dealt)
    results = save_with_threads(tmp_path, 6, dealt, storage=FailingDisk(name))
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "no space left" in str(result)
    assert find(tmp_path).step == 5
    assert (tmp_path / "latest").read_text() == "global_step5"
    assert not list(tmp_path.glob(".global*")), "the space is given back"
    results = save_with_threads(tmp_path, 6, dealt)
    assert find(tmp_path).step == 6


def test_retention(tmp_path: Path) -> None:
    retention = Retention(keep_last_n=3, keep_steps=[2], keep_every=4)
    for step in range(1, 11):
        save(tmp_path, step, [piece(step)], {}, retention=retention)
    assert steps(tmp_path) == [2, 4, 8, 9, 10]


def test_where_a_run_may_have_to_go_back_to_stays(tmp_path: Path) -> None:
    """Bad steps from 5 on: 4 stays while they count (3 as well, if 4 has not helped before), and no longer."""
    for step in range(1, 9):
        before = {5: (5, 1), 6: (5, 1), 7: (5, 2)}.get(step, (None, 1))
        save(tmp_path, step, [piece(step)], {}, retention=Retention(2, keep_before=before[0], num_before=before[1]))
        assert steps(tmp_path) == {5: [4, 5], 6: [4, 5, 6], 7: [4, 6, 7], 8: [7, 8]}.get(step, steps(tmp_path))
    assert Retention(keep_before=5, num_before=2).stay(range(1, 9)) == {3, 4}
    assert Retention(keep_before=1).stay(range(1, 9)) == set()


def test_two_always_stay(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step, [piece()], {}, retention=Retention(keep_last_n=1))
    assert steps(tmp_path) == [3, 4]


def test_pruning_follows_the_time_of_writing_and_spares_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "global_step1" / "mp_rank_00_model_states.pt").write_text("another program's")
    for step in (100, 200, 110, 120):  # rolled back from 200 to 100 and went on
        save(tmp_path, step, [piece()], {}, retention=Retention(keep_last_n=2))
    assert steps(tmp_path) == [1, 110, 120]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, [piece(1.0)], {})
    save(tmp_path, 3, [piece(2.0)], {})
    assert open_checkpoint(tmp_path).read("w").unique().tolist() == [2.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step3", "latest"]


def test_a_state_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON compliant"):
        save(tmp_path, 3, [piece()], {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../a.yml", "b/a.yml", ""])
def test_source_files_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="plain name"):
        save(tmp_path, 3, [piece()], {}, source_files=[(name, "")])
