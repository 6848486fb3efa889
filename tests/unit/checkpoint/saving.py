"""Helpers: random models, random divisions of them over ranks, and saves by several ranks as threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch

from megatron.checkpoint import Piece, Saved, save
from megatron.parallel.sharding import ShardSpec

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SPECS = {
    "embedding": ShardSpec((24, 5), 0),
    "dense.weight": ShardSpec((7, 12), 1),
    "dense.bias": ShardSpec((7,)),
    "stack": ShardSpec((3, 8, 5), 1),
    "linear.bias": ShardSpec((12,), 0),
    "scale": ShardSpec(()),
    "deep": ShardSpec((2, 3, 4), 2),
}


def random_tensors(seed: int, specs: dict[str, ShardSpec] = SPECS) -> dict[tuple[str, str], torch.Tensor]:
    """A tensor for every (name, kind)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, kind): torch.randn(spec.logical_shape, generator=generator)
        for name, spec in specs.items()
        for kind in KINDS
    }


def cut(
    tensors: dict[tuple[str, str], torch.Tensor],
    specs: dict[str, ShardSpec],
    tp_size: int,
    holders: int,
    seed: int,
) -> list[list[Piece]]:
    """Divide every shard at arbitrary points and deal the fragments to `holders` ranks, replicas on top."""
    random = Random(seed)
    dealt: list[list[Piece]] = [[] for _ in range(holders)]
    for (name, kind), tensor in tensors.items():
        for tp_rank in range(tp_size):
            flat = specs[name].take(tensor, tp_rank, tp_size).reshape(-1)
            cuts = sorted(random.randrange(flat.numel() + 1) for _ in range(random.randrange(4)))
            for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
                piece = Piece(name, kind, specs[name], tp_rank, tp_size, start, stop, flat[start:stop].clone())
                random.choice(dealt).append(piece)
    return dealt


def together(world_size: int, work: Callable[[int, Callable[[str], list[str]]], Any]) -> list[Any]:
    """Call work(rank, share) in one thread per rank; each one's result, or the exception it raised."""
    texts = [""] * world_size
    barrier = threading.Barrier(world_size, timeout=30)

    def one(rank: int) -> Any:
        def share(text: str) -> list[str]:
            texts[rank] = text
            barrier.wait()
            result = list(texts)
            barrier.wait()
            return result

        try:
            return work(rank, share)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


def save_with_threads(root: str | Path, step: int, dealt: list[list[Piece]], **arguments: Any) -> list[Any]:
    """Save with one thread per rank; each one's result, or the exception it raised."""

    def work(rank: int, share: Callable[[str], list[str]]) -> Saved:
        return save(
            root, step, dealt[rank], {"by": 0}, rank=rank, world_size=len(dealt), share=share,
            rank_tensors={"number": torch.tensor([rank])}, **arguments,
        )  # fmt: skip

    return together(len(dealt), work)
