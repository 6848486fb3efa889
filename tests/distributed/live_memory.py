"""Count the bytes of all live tensors of a process, operation by operation, the way an allocator would see them.

A stand-in on the CPU for torch.cuda.max_memory_allocated: exact, without rounding or fragmentation. Invariant: a
storage counts once, from the operation that made it until it is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveMemory(TorchDispatchMode):
    """While entered, `live` is the bytes of the tensors made or used here that still exist; `peak` the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peak_operation = ""
        self._known: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_flatten((args, kwargs, result))[0]:
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        if self.live > self.peak:
            self.peak, self.peak_operation = self.live, str(function)
        return result

    @contextmanager
    def peak_within(self) -> Iterator[list[int]]:
        """The peak of a stretch of code, as the one element of the list, once it is over."""
        found: list[int] = []
        self.peak = self.live
        yield found
        found.append(self.peak)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = weakref.ref(storage, self._forget)
        size = storage.nbytes()
        known = self._known.get(key)
        if known is None:
            self._known[key] = size
            self.live += size
        elif known != size:  # resized in place, as ZeRO 3 does
            self._known[key] = size
            self.live += size - known

    def _forget(self, key: weakref.ref[Any]) -> None:
        self.live -= self._known.pop(key, 0)
