"""Activation recomputation: keep less in the forward pass, compute it again in the backward pass.

What is given up, from nothing to almost all: `none`; `selective`, the inside of attention; `full`, all within a group
of blocks, of which only the input is kept. Invariant: the second pass draws the same dropout masks, so gradients are
bitwise the same.
Sources: Chen et al. 2016 (arXiv 1604.06174); Korthikanti et al. 2022 (arXiv 2205.05198), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron.parallel.random_streams import RandomStream

Mode = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """What to recompute. group_size: blocks that share one kept input, with `full`."""

    mode: Mode = "none"
    group_size: int = 1


def recomputed(
    function: Callable[..., torch.Tensor], stream: RandomStream | None, *args: torch.Tensor | None
) -> torch.Tensor:
    """`function(*args)`, of which only the arguments are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args)
    if stream is None:
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args, use_reentrant=False, context_fn=stream.replay_contexts)


class RecomputedGroup:
    """Consecutive blocks that run as one and keep nothing but their input while training. It owns nothing."""

    def __init__(self, blocks: Sequence[nn.Module], stream: RandomStream | None) -> None:
        self.blocks = list(blocks)
        self.stream = stream

    def __call__(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: x [B, T, H] -> [B, T, H]."""
        if not self.blocks[0].training:
            return self._run(x, positions)
        return recomputed(self._run, self.stream, x, positions)

    def _run(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        for block in self.blocks:
            # A pipeline stage passes hidden states alone.
            x = block(x) if positions is None else block(x, positions)
        return x


def grouped(
    functions: Sequence[Callable[..., torch.Tensor]],
    is_block: Callable[[object], bool],
    recompute: Recompute,
    stream: RandomStream | None,
) -> list[Callable[..., torch.Tensor]]:
    """The same sequence with every run of blocks cut into recomputed groups; unchanged unless the mode is `full`."""
    if recompute.mode != "full":
        return list(functions)
    result: list[Callable[..., torch.Tensor]] = []
    run: list[nn.Module] = []
    for function in functions:
        if isinstance(function, nn.Module) and is_block(function):
            run.append(function)
            if len(run) < recompute.group_size:
                continue
        if run:
            result.append(RecomputedGroup(run, stream))
        if not run or function is not run[-1]:
            result.append(function)
        run = []
    return [*result, RecomputedGroup(run, stream)] if run else result
