"""Initial values as a function of (seed, parameter name, logical shape): bitwise the same at every layout.

Values are drawn on the CPU in fp32, whatever device the parameter lives on, because generators of different devices
give different streams. Not here: which parameter gets which distribution (megatron.model.init).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from megatron.parallel.sharding import get_shard_spec


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


@torch.no_grad()
def fill_from(
    parameter: torch.nn.Parameter,
    name: str,
    draw: Callable[[torch.Tensor, torch.Generator], object],
    *,
    seed: int,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Draw the logical tensor and keep this rank's shard of it.

    The whole logical tensor exists for a moment on every rank; the largest one (the embedding of a 20B model) is 1.2
    GB.
    """
    spec = get_shard_spec(parameter)
    logical = torch.empty(spec.logical_shape, dtype=torch.float32, device="cpu")
    draw(logical, named_generator(seed, name))
    parameter.copy_(spec.take(logical, tp_rank, tp_size))
