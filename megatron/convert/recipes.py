"""How tensors of Hugging Face become native ones, and back, group by group.

A recipe is a pair of exact inverses that move elements and compute nothing. It works on any dtype and on "meta"
tensors, where it tells shapes. Invariant: `to_hf(to_native(x))` is x, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, cat, stack

Move = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Recipe:
    """to_native: tensors as they lie in Hugging Face's files -> native logical ones; to_hf: its inverse."""

    to_native: Move
    to_hf: Move


@dataclass(frozen=True)
class Group:
    """Tensors that belong together: names in the file, our names, and how one becomes the other."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    recipe: Recipe


def _same(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


def _turned(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.t().contiguous() for tensor in tensors]


SAME = Recipe(_same, _same)
# GPT-2 multiplies from the other side: its matrices are [in, out].
TRANSPOSED = Recipe(_turned, _turned)


def chain(first: Recipe, second: Recipe) -> Recipe:
    """`first`, then `second`, on the way to native tensors."""
    return Recipe(
        lambda tensors: second.to_native(first.to_native(tensors)),
        lambda tensors: first.to_hf(second.to_hf(tensors)),
    )


def interleaved(num_parts: int, num_heads: int, head_dim: int) -> Recipe:
    """`num_parts` tensors of rows [heads, D] <-> one of rows [heads, parts, D]."""

    def to_native(tensors: Sequence[Tensor]) -> list[Tensor]:
        heads = [tensor.reshape(num_heads, head_dim, *tensor.shape[1:]) for tensor in tensors]
        return [stack(heads, 1).flatten(0, 2)]

    def to_hf(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        parts = whole.reshape(num_heads, num_parts, head_dim, *whole.shape[1:]).unbind(1)
        return [part.flatten(0, 1) for part in parts]

    return Recipe(to_native, to_hf)


def three_blocks() -> Recipe:
    """One tensor of rows [3, N, D] <-> queries, keys and values of rows [N, D]."""
    return Recipe(lambda tensors: list(tensors[0].chunk(3)), lambda tensors: [cat(list(tensors))])


def grouped(num_heads: int, num_groups: int, head_dim: int) -> Recipe:
    """One tensor of rows [G, N / G + 2, D], each group's queries, then its key and value <-> [N, D] and [G, 2, D]."""
    width = num_heads // num_groups

    def to_native(tensors: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = tensors
        rows = whole.reshape(num_groups, width + 2, head_dim, *whole.shape[1:])
        return [rows[:, :width].flatten(0, 2), rows[:, width:].flatten(0, 2)]

    def to_hf(tensors: Sequence[Tensor]) -> list[Tensor]:
        query, key_value = tensors
        rest = query.shape[1:]
        parts = [
            query.reshape(num_groups, width, head_dim, *rest),
            key_value.reshape(num_groups, 2, head_dim, *rest),
        ]
        return [cat(parts, 1).flatten(0, 2)]

    return Recipe(to_native, to_hf)
