"""Arithmetic between any two layouts of one logical tensor.

A tensor divided along `dim` folds into a matrix [rows, width]: rows are the dimensions before `dim`, width is `dim`
and all after it. A tensor-parallel shard is then a range of columns, and any range of a flattened shard is at most
three rectangles of that matrix. Copying between layouts is intersecting rectangles. No file and no process group is
known here.
Invariant: every element is copied from its own logical position, whatever the cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron.parallel.sharding import ShardSpec


@dataclass(frozen=True)
class Block:
    """A rectangle of the folded logical tensor that lies contiguously, row after row, in a flat buffer.

    row, rows, column, columns: the rectangle. offset: its first element in the buffer.
    """

    row: int
    rows: int
    column: int
    columns: int
    offset: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The rectangle as a [rows, columns] view of the flat buffer."""
        return buffer[self.offset : self.offset + self.rows * self.columns].view(self.rows, self.columns)

    def meets(self, other: Block) -> bool:
        """Whether both rectangles hold an element."""
        return (
            max(self.row, other.row) < min(self.row + self.rows, other.row + other.rows)
            and max(self.column, other.column) < min(self.column + self.columns, other.column + other.columns)
        )  # fmt: skip

    def spans(self, other: Block) -> Iterator[tuple[int, int]]:
        """Where in the buffer of this rectangle the elements lie that `other` holds too: [start, stop) per row.

        Whole rows are one span. The rectangles must meet.
        """
        row0, row1 = max(self.row, other.row), min(self.row + self.rows, other.row + other.rows)
        col0, col1 = max(self.column, other.column), min(self.column + self.columns, other.column + other.columns)
        first = self.offset + (row0 - self.row) * self.columns + col0 - self.column
        if col1 - col0 == self.columns:
            yield first, first + (row1 - row0) * self.columns
            return
        for row in range(row1 - row0):
            yield first + row * self.columns, first + row * self.columns + col1 - col0


def fold(spec: ShardSpec) -> tuple[int, int]:
    """(rows, width) of the logical tensor as a matrix. A replicated tensor is one row."""
    dim = spec.dim or 0
    return math.prod(spec.logical_shape[:dim]), math.prod(spec.logical_shape[dim:])


def blocks(spec: ShardSpec, tp_rank: int, tp_size: int, start: int, stop: int) -> list[Block]:
    """The rectangles of elements [start, stop) of the flattened shard; offsets count from `start`."""
    if start >= stop:
        return []
    _, width = fold(spec)
    part = width if spec.dim is None else width // tp_size
    origin = 0 if spec.dim is None else tp_rank * part
    first, head = divmod(start, part)
    last, tail = divmod(stop, part)
    if first == last:
        return [Block(first, 1, origin + head, stop - start, 0)]
    found, offset = [], 0
    if head:
        found.append(Block(first, 1, origin + head, part - head, 0))
        first, offset = first + 1, part - head
    if last > first:
        found.append(Block(first, last - first, origin, part, offset))
        offset += (last - first) * part
    if tail:
        found.append(Block(last, 1, origin, tail, offset))
    return found


def copy_overlap(target: torch.Tensor, target_block: Block, source: torch.Tensor, source_block: Block) -> None:
    """Copy the elements that both rectangles hold, from the flat `source` into the flat `target`."""
    t, s = target_block, source_block
    row0, row1 = max(t.row, s.row), min(t.row + t.rows, s.row + s.rows)
    col0, col1 = max(t.column, s.column), min(t.column + t.columns, s.column + s.columns)
    if row0 >= row1 or col0 >= col1:
        return
    wanted = t.view(target)[row0 - t.row : row1 - t.row, col0 - t.column : col1 - t.column]
    wanted.copy_(s.view(source)[row0 - s.row : row1 - s.row, col0 - s.column : col1 - s.column])


def check_cover(name: str, spec: ShardSpec, tp_size: int, ranges: Iterable[Sequence[int]]) -> str | None:
    """Say what is wrong if the (tp_rank, start, stop) ranges are not the whole tensor exactly once, else None."""
    shards = 1 if spec.dim is None else tp_size
    size = spec.shard_numel(tp_size)
    by_rank: dict[int, list[tuple[int, int]]] = {tp_rank: [] for tp_rank in range(shards)}
    for tp_rank, start, stop in ranges:
        if tp_rank not in by_rank:
            return f"{name}: a piece of tensor-parallel rank {tp_rank}, but there are {shards} shards"
        by_rank[tp_rank].append((start, stop))
    for tp_rank, spans in by_rank.items():
        reached = 0
        for start, stop in sorted(spans):
            if start > reached:
                return f"{name}: elements {reached} to {start} of shard {tp_rank} of {shards} are missing"
            if start < reached:
                return f"{name}: elements {start} to {min(stop, reached)} of shard {tp_rank} of {shards} came twice"
            reached = stop
        if reached != size:
            what = "are missing" if reached < size else "are beyond its end"
            lower, upper = sorted((reached, size))
            return f"{name}: elements {lower} to {upper} of shard {tp_rank} of {shards} {what}"
    return None
