"""Any division of a tensor in, any division out."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import pytest
import torch

from megatron.checkpoint import Piece, Reader, save
from megatron.checkpoint.layout import blocks, check_cover
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.saving import KINDS, SPECS, cut, random_tensors, save_with_threads


@pytest.mark.parametrize(("tp_size", "holders", "seed"), [(1, 1, 0), (1, 4, 1), (2, 3, 2), (4, 2, 3), (4, 8, 4)])
def test_every_shard_and_range_at_every_layout(tmp_path: Path, tp_size: int, holders: int, seed: int) -> None:
    tensors = random_tensors(seed)
    for result in save_with_threads(tmp_path, 7, cut(tensors, SPECS, tp_size, holders, seed)):
        assert not isinstance(result, Exception), result
    reader, random = Reader(tmp_path / "global_step7"), Random(seed)
    reader.verify()
    for kind in KINDS:
        assert sorted(reader.names(kind)) == sorted(SPECS)
    for (name, kind), tensor in tensors.items():
        assert torch.equal(reader.read(name, kind), tensor)
        for size in (1, 2, 4):
            for tp_rank in range(size):
                flat = SPECS[name].take(tensor, tp_rank, size).reshape(-1)
                start = random.randrange(flat.numel() + 1)
                stop = random.randrange(start, flat.numel() + 1)
                assert torch.equal(reader.read_shard(name, kind, tp_rank, size), flat)
                assert torch.equal(reader.read_shard(name, kind, tp_rank, size, start, stop), flat[start:stop])
    assert [int(reader.rank_tensors(rank)["number"]) for rank in range(holders)] == list(range(holders))
    assert reader.rank_tensors(holders) == {}


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_blocks_hold_exactly_the_range(dim: int | None) -> None:
    spec = ShardSpec((2, 4, 6), dim)
    logical = torch.arange(48).view(2, 4, 6)
    rows = 1 if dim is None else logical.shape[:dim].numel()
    matrix = logical.view(rows, -1)
    flat = spec.take(logical, 1, 2).reshape(-1)
    for start, stop in itertools.combinations(range(flat.numel() + 1), 2):
        found = blocks(spec, 1, 2, start, stop)
        values = torch.cat([matrix[b.row : b.row + b.rows, b.column : b.column + b.columns].reshape(-1) for b in found])
        assert torch.equal(values, flat[start:stop])
        assert len(found) <= 3
        assert [b.offset for b in found] == [0, *itertools.accumulate(b.rows * b.columns for b in found)][:-1]


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ([(0, 0, 6), (1, 0, 6)], None),
        ([(0, 0, 2), (0, 2, 6), (1, 3, 6), (1, 0, 3)], None),
        ([(0, 0, 6)], "elements 0 to 6 of shard 1 of 2 are missing"),
        ([(0, 1, 6), (1, 0, 6)], "elements 0 to 1 of shard 0 of 2 are missing"),
        ([(0, 0, 2), (0, 3, 6), (1, 0, 6)], "elements 2 to 3 of shard 0 of 2 are missing"),
        ([(0, 0, 4), (0, 3, 6), (1, 0, 6)], "elements 3 to 4 of shard 0 of 2 came twice"),
        ([(0, 0, 6), (0, 0, 6), (1, 0, 6)], "elements 0 to 6 of shard 0 of 2 came twice"),
        ([(0, 0, 6), (1, 0, 6), (2, 0, 6)], "tensor-parallel rank 2, but there are 2 shards"),
        ([(0, 0, 6), (1, 0, 5)], "elements 5 to 6 of shard 1 of 2 are missing"),
        ([(0, 0, 6), (1, 0, 7)], "elements 6 to 7 of shard 1 of 2 are beyond its end"),
    ],
)
def test_cover(ranges: list[tuple[int, int, int]], problem: str | None) -> None:
    found = check_cover("w", ShardSpec((4, 3), 0), 2, ranges)
    assert found is None if problem is None else found is not None and problem in found and found.startswith("w: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_types_survive_and_convert(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(15).to(dtype)
    odd = torch.arange(3, dtype=torch.uint8)
    pieces = [Piece.whole("odd", "weight", ShardSpec((3,)), odd), Piece.whole("w", "weight", ShardSpec((15,)), values)]
    save(tmp_path, 1, pieces, {})
    reader = Reader(tmp_path / "global_step1")
    assert reader.dtype("w") == dtype
    assert torch.equal(reader.read("w"), values)
    assert torch.equal(reader.read("odd"), odd)
    assert reader.read("w", dtype=torch.float64).tolist() == list(range(15))
