"""A copy of this rank's pieces in host memory, so that training may go on while they are written.

It writes nothing. Invariant: once `take` has returned, the copies no longer follow the tensors they were made from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from megatron.checkpoint.piece import Piece


class Snapshot:
    """Buffers that are made at the first save and used again at every later one; page-locked where pieces lie on CUDA.

    Memory: as much as this rank writes (12 bytes per parameter held, with Adam).
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with tensors of our own. The copies of an earlier `take` are overwritten."""
        copies, devices = [], set()
        for piece in pieces:
            source = piece.tensor.detach()
            buffer = self._buffer(piece, source)
            buffer.copy_(source.reshape(-1), non_blocking=True)
            if source.is_cuda:
                devices.add(source.device)
            copies.append(dataclasses.replace(piece, tensor=buffer))
        for device in devices:
            torch.cuda.synchronize(device)
        return copies

    def _buffer(self, piece: Piece, source: torch.Tensor) -> torch.Tensor:
        key = (piece.key, piece.tp_rank)
        held = self._buffers.get(key)
        if held is None or held.shape != (source.numel(),) or held.dtype != source.dtype:
            held = torch.empty(source.numel(), dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = held
        return held
