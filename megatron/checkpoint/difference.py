"""Where two checkpoints differ, tensor by tensor, whatever layouts wrote them.

One process, no process group; tensors are read in portions, so memory does not grow with them. Not here: printing
(megatron.cli.inspect_checkpoints). Invariant: two tensors count as identical only if all their bits are, padding of
the vocabulary aside, which the layout chooses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.checkpoint.reader import Reader

PORTION = 1 << 22  # elements; 16 MiB of fp32 of each of the two
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two checkpoints compares.

    reason: why it cannot be compared by values (in one only, other shape), else "". num_differing: elements whose bits
    differ. largest: the largest difference; relative: that over the first's largest element. first_at: index of the
    first element that differs, with its two values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str = ""
    num_differing: int = 0
    num_elements: int = 0
    largest: float = 0.0
    relative: float = 0.0
    first_at: tuple[int, ...] = ()
    first_values: tuple[float, float] = (0.0, 0.0)

    @property
    def is_identical(self) -> bool:
        """Whether all bits agree."""
        return not self.reason and not self.num_differing

    def __str__(self) -> str:
        label = f"{self.name} ({self.kind})"
        if self.is_identical:
            return f"{label}: identical"
        if self.reason:
            return f"{label}: {self.reason}"
        one, other = self.first_values
        return (
            f"{label}: {self.num_differing:,} of {self.num_elements:,} elements differ, by up to {self.largest:.3g} "
            f"({self.relative:.2g} of the largest); first at {list(self.first_at)}: {one:.9g} and {other:.9g}"
        )


def compare_tensors(one: Reader, other: Reader, kinds: Collection[str] | None = None) -> Iterator[TensorDifference]:
    """Every tensor of either, in the model's order, then the kinds of each. kinds: only these."""
    names = one.names() + [name for name in other.names() if name not in set(one.names())]
    for name in names:
        held = [reader.kinds(name) if name in set(reader.names()) else [] for reader in (one, other)]
        for kind in dict.fromkeys(held[0] + held[1]):
            if kinds is None or kind in kinds:
                yield _compare(one, other, name, kind, [kind in there for there in held])


def _compare(one: Reader, other: Reader, name: str, kind: str, is_held: list[bool]) -> TensorDifference:
    if not all(is_held):
        shape = (one if is_held[0] else other).spec(name).logical_shape
        return TensorDifference(name, kind, shape, f"only in the {'first' if is_held[0] else 'second'}")
    shapes = [reader.spec(name).logical_shape for reader in (one, other)]
    used = [reader.used_rows(name) for reader in (one, other)]
    if used[0] is not None and used[0] == used[1]:
        shapes = [(used[0], *shape[1:]) for shape in shapes]
    shape = shapes[0]
    if shapes[0] != shapes[1]:
        return TensorDifference(name, kind, shape, f"shape {list(shapes[0])} and {list(shapes[1])}")
    dtypes = [reader.dtype(name, kind) for reader in (one, other)]
    if dtypes[0] != dtypes[1]:
        return TensorDifference(name, kind, shape, f"{dtypes[0]} and {dtypes[1]}".replace("torch.", ""))
    return _compare_values(one, other, name, kind, shape)


def _compare_values(one: Reader, other: Reader, name: str, kind: str, shape: tuple[int, ...]) -> TensorDifference:
    total = math.prod(shape)
    num_differing, largest, size = 0, 0.0, 0.0
    first: int | None = None
    values = (0.0, 0.0)
    for start in range(0, total, PORTION):
        stop = min(start + PORTION, total)
        a, b = (reader.read_shard(name, kind, 0, 1, start, stop) for reader in (one, other))
        size = max(size, _largest(a))
        bits = _BITS[a.element_size()]
        differs = a.view(bits) != b.view(bits)
        count = int(differs.sum())
        if not count:
            continue
        num_differing += count
        if first is None:
            position = int(differs.to(torch.uint8).argmax())
            first, values = start + position, (float(a[position]), float(b[position]))
        largest = max(largest, _largest(a.double() - b.double(), is_difference=True))
    at = () if first is None else tuple(int(index) for index in torch.unravel_index(torch.tensor(first), shape or (1,)))
    relative = largest / size if size else (math.inf if largest else 0.0)
    return TensorDifference(name, kind, shape, "", num_differing, total, largest, relative, at, values)


def _largest(tensor: torch.Tensor, *, is_difference: bool = False) -> float:
    """The largest absolute value; a NaN counts as infinite in a difference, and as nothing in a size."""
    if not tensor.numel():
        return 0.0
    return float(tensor.double().abs().nan_to_num(nan=math.inf if is_difference else 0.0, posinf=math.inf).max())


def compare_random_states(one: Reader, other: Reader) -> list[str]:
    """A sentence for each rank and generator whose state differs; empty where the layouts do, which shape them."""
    if one.state.get("layout") != other.state.get("layout"):
        return []
    found = []
    for rank in range(max(one.num_ranks, other.num_ranks)):
        a, b = one.rank_tensors(rank), other.rank_tensors(rank)
        found += [
            f"random state {name} of rank {rank}"
            for name in sorted({*a, *b})
            if name not in a or name not in b or not torch.equal(a[name], b[name])
        ]
    return found


def compare_state(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key path with dots, value there, value here) of everything beside the tensors that differs; None for absent."""
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from compare_state(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
