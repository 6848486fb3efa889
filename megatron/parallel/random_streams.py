"""Which random numbers dropout draws.

Two streams on every rank, both functions of the seed. `replicated` is torch's default generator: alike on all
tensor-parallel ranks, other on every replica and stage; it serves what all tensor-parallel ranks hold. `divided`
differs on every rank; it serves what they divide between them (heads, and with sequence parallelism tokens).
Invariant: recomputing a block draws the same numbers again, from both.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from megatron.parallel.process_groups import ProcessGroups


class RandomStream:
    """A state of torch's generator of one device that waits beside the default one until it is switched in."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.state = torch.Generator(device=device).manual_seed(seed).get_state()

    @contextlib.contextmanager
    def switched_in(self) -> Iterator[None]:
        """Within, torch draws from this stream; behind, the default generator goes on as if nothing had been."""
        outer = self._get()
        self._set(self.state)
        try:
            yield
        finally:
            self.state = self._get()
            self._set(outer)

    def capture(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of torch's default generator and of this stream."""
        return self._get(), self.state

    def restore(self, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Put back what `capture` gave."""
        default, self.state = states
        self._set(default)

    def replay_contexts(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """The pair that torch.utils.checkpoint wants: remember the forward pass's state, recompute from there."""
        remembered: list[torch.Tensor] = []

        @contextlib.contextmanager
        def first() -> Iterator[None]:
            remembered.append(self.state)
            yield

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            later, self.state = self.state, remembered[0]
            try:
                yield
            finally:
                self.state = later

        return first(), again()

    def _get(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: torch.Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


def seed_streams(seed: int, groups: ProcessGroups, device: torch.device, step: int = 0) -> RandomStream:
    """Seed every default generator of this rank and return its `divided` stream; other numbers for every `step`."""
    at = groups.at
    replicated = (seed * 1_000_003 + step * 15_485_863 + at.pp_rank * 10_007 + at.dp_rank) % 2**32
    random.seed(replicated)
    np.random.seed(replicated)
    torch.manual_seed(replicated)
    return RandomStream((replicated * 4_099 + 1 + at.tp_rank) % 2**63, device)
