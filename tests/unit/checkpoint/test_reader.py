"""Damage is found and named, the checkpoint before it is loaded instead, and paddings fit the model that reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.checkpoint import Piece, Reader, find, open_checkpoint, save
from megatron.common.errors import CheckpointError
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.saving import SPECS, cut, random_tensors, save_with_threads, together


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2):
        dealt = cut(random_tensors(step), SPECS, 2, 2, seed=step)
        save_with_threads(tmp_path, step, dealt, source_files=[("a.yml", "seed: 1\n"), ("b.yml", "")])
    return tmp_path


def check_fallback(root: Path, told: str) -> str:
    notes: list[str] = []
    reader = open_checkpoint(root, report=notes.append)
    assert reader.step == 1
    text = "\n".join(notes)
    assert told in text
    with pytest.raises(CheckpointError, match=r"damaged|missing|cut short|manifest|read") as caught:
        open_checkpoint(root, 2, report=notes.append)
    assert told in str(caught.value)
    return text


def test_one_flipped_byte_anywhere_is_found_and_named(root: Path) -> None:
    files = [path for path in sorted((root / "global_step2").rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        for position in {0, 9, len(whole) // 2, len(whole) - 2, len(whole) - 1} & set(range(len(whole))):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
            check_fallback(root, str(path))
        path.write_bytes(whole)
    assert open_checkpoint(root).step == 2


def test_the_damaged_tensor_is_named(root: Path) -> None:
    path = root / "global_step2" / "rank_00000.safetensors"
    whole = path.read_bytes()
    value = Reader(path.parent).read("embedding")
    for name, kind in (("embedding", "weight"), ("deep", "exp_avg_sq")):
        pieces = Reader(path.parent)._manifest["tensors"][name]["kinds"][kind]["pieces"]
        offset = next(piece[4] for piece in pieces if piece[0] == 0 and piece[3] > piece[2])
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        assert f"tensor {name} ({kind})" in check_fallback(root, str(path))
    # Generation needs the weights only, and those are whole.
    reader = open_checkpoint(root, kinds=["weight"])
    assert reader.step == 2
    assert torch.equal(reader.read("embedding"), value)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "manifest.json", "configs/a.yml"])
def test_a_file_cut_short_or_missing(root: Path, name: str) -> None:
    path = root / "global_step2" / name
    path.write_bytes(path.read_bytes()[:-1])
    check_fallback(root, str(path))
    path.unlink()
    check_fallback(root, str(path.parent) if name == "manifest.json" else str(path))


def test_a_foreign_folder_and_one_without_files_are_passed_over(root: Path) -> None:
    foreign = root / "global_step3"
    foreign.mkdir()
    (foreign / "mp_rank_00_model_states.pt").write_bytes(b"another program's")
    (root / "global_step4").mkdir()
    (root / "latest").write_text("global_step3")
    notes: list[str] = []
    assert open_checkpoint(root, report=notes.append).step == 2
    text = "\n".join(notes)
    for folder in ("global_step3", "global_step4"):
        assert f"{root / folder} holds no manifest.json: it is not a complete checkpoint of this program" in text
    with pytest.raises(CheckpointError, match=r"global_step3 holds no manifest\.json"):
        open_checkpoint(root, 3)


def test_every_process_comes_to_the_same_choice(root: Path) -> None:
    """Only one of the parts meets the damage; all pass the checkpoint over, and all can say why."""
    path = root / "global_step2" / "rank_00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    failing = []
    for part in range(3):
        try:
            Reader(path.parent).verify(part=part, parts=3)
        except CheckpointError:
            failing.append(part)
    assert len(failing) == 1

    def opened(part: int, share: Callable[[str], list[str]]) -> tuple[int, list[str]]:
        notes: list[str] = []
        return open_checkpoint(root, part=part, parts=3, share=share, report=notes.append).step, notes

    outcomes = together(3, opened)
    assert outcomes[0][0] == 1
    assert f"{path}" in outcomes[0][1][0]
    assert outcomes == [outcomes[0]] * 3


def test_processes_that_see_different_checkpoints_say_so(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "global_step1", tmp_path / "other" / "global_step1")
    for name, sight in (("other", "global_step1 of"), ("none", f"{tmp_path / 'none'} does not exist")):
        for outcome in together(2, lambda part, share: open_checkpoint([root, tmp_path / name][part], share=share)):  # noqa: B023
            assert "the ranks see different checkpoints" in str(outcome)
            assert "rank 0: global_step2 of" in str(outcome)
            assert f"rank 1: {sight}" in str(outcome)


def test_nothing_to_load_says_why(root: Path, tmp_path: Path) -> None:
    for folder in root.glob("global_step*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)global_step1 holds no manifest.*global_step2|global_step2.*step1"):
        find(root)
    with pytest.raises(CheckpointError, match="does not exist"):
        find(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(tmp_path / "empty")


def test_a_step_or_a_folder_can_be_asked_for(root: Path) -> None:
    assert find(root).step == 2
    assert find(root, 1).step == 1
    assert find(root / "global_step1").step == 1
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; those there: 1, 2"):
        find(root, 3)
    assert find(root).notes == ()


@pytest.mark.parametrize(
    ("content", "step", "told"),
    [
        (b"global_step99", 2, "names step 99, which is not complete"),
        (b"global_stepR", 2, "latest is damaged: it names no checkpoint (b'global_stepR')"),
        (b"\xe7lobal_step2", 2, "latest is damaged: it names no checkpoint"),
        (b"", 2, "latest is damaged"),
        # A bit can make one digit of another, and people move it too.
        (b"global_step1", 1, "global_step2 was written later than what"),
    ],
)
def test_a_pointer_that_is_damaged_or_moved_is_said(root: Path, content: bytes, step: int, told: str) -> None:
    (root / "latest").write_bytes(content)
    notes: list[str] = []
    assert open_checkpoint(root, report=notes.append).step == step
    assert told in notes[0]
    assert notes[1:] == [f"warning: loading {root / f'global_step{step}'} instead"]


def test_a_newer_format_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.checkpoint.manifest.FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="format version 1, this program reads up to 0"):
        Reader(root / "global_step2")


def test_padded_rows_fit_the_reader(tmp_path: Path) -> None:
    spec, tensor = ShardSpec((12, 3), 0), torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    other = Piece.whole("other", "weight", spec, tensor)
    save(tmp_path, 1, [Piece.whole("embedding", "weight", spec, tensor), other], {}, used_rows={"embedding": 9})
    reader = Reader(tmp_path / "global_step1")
    assert torch.equal(reader.read("embedding", rows=10), tensor[:10])
    longer = torch.cat([tensor, torch.zeros(4, 3)])
    assert torch.equal(reader.read("embedding", rows=16), longer)
    for tp_rank in range(4):
        shard = reader.read_shard("embedding", "weight", tp_rank, 4, 1, 11, rows=16)
        assert torch.equal(shard, longer[4 * tp_rank : 4 * tp_rank + 4].reshape(-1)[1:11])
    with pytest.raises(CheckpointError, match="needs at least 9 rows, the model has 8"):
        reader.read("embedding", rows=8)
    with pytest.raises(CheckpointError, match="needs exactly 12 rows, the model has 16"):
        reader.read("other", rows=16)


def test_what_is_not_there_is_named(root: Path) -> None:
    reader = Reader(root / "global_step2")
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        reader.read("nothing")
    with pytest.raises(CheckpointError, match="no momentum of embedding, only"):
        reader.read("embedding", "momentum")
    with pytest.raises(CheckpointError, match="does not divide over 5"):
        reader.read_shard("embedding", "weight", 0, 5)
    with pytest.raises(CheckpointError, match="elements 0 to 121 were asked of a shard of 120"):
        reader.read_shard("embedding", "weight", 0, 1, 0, 121)


def test_what_is_read_is_the_readers_own(root: Path) -> None:
    reader = Reader(root / "global_step2")
    before = reader.read("embedding")
    reader.read("embedding").zero_()
    assert torch.equal(reader.read("embedding"), before)
    reader.verify()
