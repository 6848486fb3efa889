"""Keys and values of the tokens seen so far, in buffers that are allocated once.

It computes no attention. Rows are filled from slot 0 without gaps, so a shorter row's next token takes the slot of its
neighbour's padding. Invariant: a row's slots below its length hold its own tokens, and no query sees a slot beyond.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron.model.spec import ModelSpec


class StaticCache:
    """The cache of a batch: `layers` gives each attention layer its store (megatron.model.layers.KeyValueStore).

    lengths: tokens in each row, virtual ones of a soft prompt included. Before a forward, the caller says with `begin`
    how many real tokens each row brings.
    Shapes: keys and values [B, G, capacity, D] per layer, with this rank's G.
    """

    def __init__(
        self,
        spec: ModelSpec,
        batch_size: int,
        capacity: int,
        *,
        tp_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, spec.kv_heads_on_rank(tp_size), capacity, spec.head_dim)
        self.capacity = capacity
        self.num_virtual_tokens = spec.num_virtual_tokens
        self.device = torch.device(device)
        self.lengths = [0] * batch_size
        # Zeros, not whatever the memory held: a masked slot still takes part in sums, times 0, and 0 times NaN is NaN.
        self.layers = [
            LayerStore(self, *(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"))
            for _ in range(spec.num_layers)
        ]
        self.end = 0
        self.slots: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def begin(self, counts: Sequence[int]) -> torch.Tensor | None:
        """Make room for `counts` new tokens per row; returns their positions, or None for 0 .. T-1.

        The first time, rows may bring different numbers of tokens, padded on the right; later each brings one.
        Shapes: int64 [B, 1]. Raises ValueError if a row would exceed the capacity.
        """
        starts = self.lengths
        # A soft prompt comes with the first tokens.
        virtual = 0 if any(starts) else self.num_virtual_tokens
        self.lengths = [start + virtual + count for start, count in zip(starts, counts, strict=True)]
        self.end = max(self.lengths)
        if self.end > self.capacity:
            raise ValueError(f"{self.end} tokens do not fit into a cache of {self.capacity}")
        self.slots = self.mask = None
        if not any(starts):
            return None
        if set(counts) != {1}:
            raise ValueError("rows that hold tokens take one at a time")
        positions = torch.tensor(starts, device=self.device)
        if len(set(starts)) > 1:
            self.slots = positions
            self.mask = (torch.arange(self.end, device=self.device) <= positions[:, None])[:, None, None, :]
        return positions[:, None]

    @property
    def held(self) -> list[int]:
        """Tokens of its text that each row holds."""
        return [max(0, length - self.num_virtual_tokens) for length in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        for store in self.layers:
            store.k, store.v = store.k[index], store.v[index]


class LayerStore:
    """One layer's keys and values."""

    def __init__(self, cache: StaticCache, k: torch.Tensor, v: torch.Tensor) -> None:
        self.cache, self.k, self.v = cache, k, v

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store the new tokens' keys and values; returns all that the queries may look at.

        Shapes: k, v [B, G, T, D] -> k, v [B, G, S, D], mask [B, 1, 1, S] or None where plain causal sight is right.
        """
        cache, T = self.cache, k.shape[2]
        if cache.slots is None:
            self.k[:, :, cache.end - T : cache.end] = k
            self.v[:, :, cache.end - T : cache.end] = v
        else:
            rows = torch.arange(k.shape[0], device=cache.device)
            self.k[rows, :, cache.slots] = k[:, :, 0]
            self.v[rows, :, cache.slots] = v[:, :, 0]
        return self.k[:, :, : cache.end], self.v[:, :, : cache.end], cache.mask
