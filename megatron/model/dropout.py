"""Dropout inside and outside of tensor-parallel regions.

Invariant: tensors that are the same on all tensor-parallel ranks are dropped alike on all, divided ones are not.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from megatron.parallel.random_streams import RandomStream


class Dropout:
    """Zero a part of the elements in training, and scale up the rest.

    is_divided: the tensor is another one on each tensor-parallel rank, so each draws numbers of its own.
    """

    def __init__(self, probability: float, stream: RandomStream | None, *, is_divided: bool) -> None:
        self.probability = probability
        self.stream = stream if is_divided else None

    def __call__(self, x: torch.Tensor, is_training: bool) -> torch.Tensor:
        if not self.probability or not is_training:
            return x
        with self.drawing():
            return F.dropout(x, self.probability)

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """Within, torch draws from the right stream."""
        if self.stream is None or not self.probability:
            return contextlib.nullcontext()
        return self.stream.switched_in()
