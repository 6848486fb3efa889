"""The gradients that the optimizer takes, as fragments of named tensors.

They are averaged over data-parallel ranks, unscaled and clipped. Not here: what is made of them. Invariant: a fragment
is seen once per step, at the place of its master weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron.checkpoint.piece import Piece
from megatron.engine.state import WEIGHT, export_pieces
from megatron.engine.train_engine import TrainEngine


def master_pieces(engine: TrainEngine) -> list[Piece]:
    """This rank's fragments of the master weights.

    To be looked up before a step: ZeRO takes the optimizer's parameter groups apart while it steps.
    """
    return [piece for piece in export_pieces(engine) if piece.kind == WEIGHT]


def gradient_pieces(optimizer: torch.optim.Optimizer, masters: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each master's fragment with its gradient, as a hook before the optimizer's own step sees them.

    ZeRO may make one call of the step per parameter group: what the groups of this call do not hold is left out.
    """
    # Keyed by storage, for a piece is a view of the flat tensor that the optimizer steps.
    flats = {
        flat.untyped_storage().data_ptr(): flat
        for group in optimizer.param_groups
        for flat in group["params"]
        if flat.grad is not None
    }
    for piece in masters:
        flat = flats.get(piece.tensor.untyped_storage().data_ptr())
        if flat is not None:
            first = piece.tensor.storage_offset() - flat.storage_offset()
            yield piece, flat.grad.flatten().narrow(0, first, piece.tensor.numel())
