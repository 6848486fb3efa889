"""Two checkpoints of whatever layouts are compared bit by bit, and what differs is named with place and size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import Piece, Reader, difference, save
from megatron.checkpoint.difference import compare_state, compare_tensors
from megatron.cli import inspect_checkpoints
from megatron.common.errors import CheckpointError, ConfigError
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.saving import SPECS, cut, random_tensors, save_with_threads


def write(root: Path, tensors: dict[tuple[str, str], torch.Tensor], tp_size: int, holders: int, step: int = 1) -> Path:
    save_with_threads(root, step, cut(tensors, SPECS, tp_size, holders, seed=step))
    return root / f"global_step{step}"


@pytest.mark.parametrize("portion", [1 << 22, 7, 1])
def test_layouts_do_not_matter_and_one_bit_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portion: int) -> None:
    monkeypatch.setattr(difference, "PORTION", portion)
    tensors = random_tensors(3)
    one = Reader(write(tmp_path / "one", tensors, 1, 1))
    other = Reader(write(tmp_path / "other", tensors, 2, 3))
    assert all(finding.is_identical for finding in compare_tensors(one, other))
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed["stack", "exp_avg"][2, 5, 3] += 1e-3
    changed["stack", "exp_avg"][2, 7, 0] = 40.0
    changed["scale", "weight"].mul_(-0.0).abs_()
    zero = {**changed, ("scale", "weight"): -changed["scale", "weight"]}
    findings = [
        finding
        for finding in compare_tensors(
            Reader(write(tmp_path / "zero", zero, 1, 2)), Reader(write(tmp_path / "changed", changed, 2, 2))
        )
        if not finding.is_identical
    ]
    # 0 and -0 are other bits, with no difference in size.
    assert [(f.name, f.kind, f.num_differing, f.largest) for f in findings] == [("scale", "weight", 1, 0.0)]
    (finding,) = [
        finding
        for finding in compare_tensors(one, Reader(tmp_path / "changed" / "global_step1"))
        if not finding.is_identical and finding.name != "scale"
    ]
    before = tensors["stack", "exp_avg"]
    assert (finding.name, finding.kind, finding.num_differing, finding.first_at) == ("stack", "exp_avg", 2, (2, 5, 3))
    assert finding.largest == pytest.approx(abs(40.0 - float(before[2, 7, 0])))
    assert finding.relative == pytest.approx(finding.largest / float(before.abs().max()))
    assert "2 of 120 elements differ" in str(finding)
    assert "[2, 5, 3]" in str(finding)


def test_nan_is_the_same_as_itself_and_infinitely_far_from_a_number(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    tensors["dense.bias", "weight"][4] = math.nan
    numbers = {key: tensor.nan_to_num(nan=1.0) for key, tensor in tensors.items()}
    readers = [Reader(write(tmp_path / name, held, 1, 1)) for name, held in (("a", tensors), ("b", tensors))]
    assert all(finding.is_identical for finding in compare_tensors(*readers))
    other = Reader(write(tmp_path / "c", numbers, 2, 1))
    (finding,) = [finding for finding in compare_tensors(readers[0], other) if not finding.is_identical]
    assert finding.largest == math.inf
    assert finding.first_at == (4,)


def test_shapes_kinds_and_padding(tmp_path: Path) -> None:
    def one(name: str, rows: int, **changes: Any) -> Reader:
        held = {"weight": torch.arange(10.0).view(5, 2), **changes}
        padded = {kind: torch.cat([t, torch.full((rows - 5, 2), float(rows))]) for kind, t in held.items()}
        spec = ShardSpec((rows, 2), 0)
        pieces = [Piece.whole("table", kind, spec, tensor) for kind, tensor in padded.items()]
        save(tmp_path / name, 1, pieces, {}, used_rows={"table": 5})
        return Reader(tmp_path / name / "global_step1")

    # What pads the vocabulary is the layout's business.
    assert all(finding.is_identical for finding in compare_tensors(one("a", 6), one("b", 8)))
    findings = list(compare_tensors(one("c", 6), one("d", 6, exp_avg=torch.zeros(5, 2))))
    assert [str(finding) for finding in findings] == [
        "table (weight): identical",
        "table (exp_avg): only in the second",
    ]
    save(tmp_path / "e", 1, [Piece.whole("table", "weight", ShardSpec((7, 2), 0), torch.zeros(7, 2))], {})
    larger = Reader(tmp_path / "e" / "global_step1")
    assert "shape [6, 2] and [7, 2]" in str(next(compare_tensors(one("f", 6), larger)))


def test_differences_of_the_state_are_given_by_path() -> None:
    one = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    other = {"a": {"b": 2, "c": [1, 2]}, "e": None, "f": 5}
    assert list(compare_state(one, other)) == [("a.b", 1, 2), ("d", 4, None), ("f", None, 5)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (2, 10):
        write(tmp_path, random_tensors(step), 2, 2, step=step)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = inspect_checkpoints.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_a_folder_is_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "global_step7").mkdir()
    code, text = run(capsys, root)
    assert code == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["2", "10"]
    assert "newest" in lines[2]
    assert "incomplete" in lines[3]
    assert "global_step7" in lines[3]
    listed = json.loads(run(capsys, root, "--json")[1])
    assert [(entry["step"], entry["is_newest"]) for entry in listed["checkpoints"]] == [(2, False), (10, True)]
    with pytest.raises(CheckpointError, match="does not exist"):
        run(capsys, root / "nowhere")


def test_one_is_shown_with_its_tensors_and_asked_for_values(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(run(capsys, root, "--iteration", 2, "--json")[1])
    assert (shown["step"], shown["ranks"], len(shown["tensors"])) == (2, 2, len(SPECS))
    assert shown["parameters"] == sum(math.prod(spec.logical_shape) for spec in SPECS.values())
    assert "stack  [3, 8, 5], divided along 1: weight float32, exp_avg float32" in run(capsys, root / "global_step2")[1]
    asked = json.loads(run(capsys, root, "--iteration", 2, "-a", "dense.*", "state/by", "step", "--json")[1])
    assert (asked["state/by"], asked["step"]) == (0, 2)
    expected = random_tensors(2)["dense.weight", "exp_avg"]
    assert asked["dense.weight (exp_avg)"]["mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert set(asked) == {
        f"dense.{n} ({k})" for n in ("weight", "bias") for k in ("weight", "exp_avg", "exp_avg_sq")
    } | {
        "state/by",
        "step",
    }
    with pytest.raises(CheckpointError, match="no tensor and no value is called dence"):
        run(capsys, root, "-a", "dence")


def test_every_damaged_tensor_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, root, "--verify")[0] == 0
    path = root / "global_step10" / "rank_00001.safetensors"
    whole = bytearray(path.read_bytes())
    wanted = []
    for name in ("stack", "embedding"):
        pieces = Reader(path.parent)._manifest["tensors"][name]["kinds"]["exp_avg"]["pieces"]
        for file, _, start, stop, offset, _ in pieces:
            if file == 1 and stop > start and name not in wanted:
                whole[offset] ^= 1
                wanted.append(name)
    path.write_bytes(bytes(whole))
    code, text = run(capsys, root, "--verify")
    assert code == 5
    assert "global_step2: " in text
    assert "every checksum fits" in text
    assert wanted
    for name in wanted:
        assert f"{path} is damaged: the checksum of tensor {name} (exp_avg)" in text
    path.write_bytes(bytes(whole)[:-1])
    code, text = run(capsys, root, "--verify", "--json")
    assert code == 5
    assert "cut short" in json.loads(text)["incomplete"][0]


def test_two_are_compared(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = root / "global_step2", root / "global_step10"
    code, text = run(capsys, one, other, "--diff")
    assert code == 1
    assert "21 of 21 tensors differ" in text
    assert run(capsys, f"{one},{one}", "--compare")[0] == 0
    assert "identical" not in run(capsys, one, one, "-d")[1]
    again = json.loads(run(capsys, one, other, "--json")[1])
    assert not again["identical"]
    assert len(again["tensors"]) == again["tensors_compared"] == 21
    with pytest.raises(ConfigError, match="goes with two folders"):
        run(capsys, one, "--diff")
    with pytest.raises(ConfigError, match="3 folders"):
        run(capsys, one, one, one)
