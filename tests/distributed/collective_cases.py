"""Tensor-parallel collectives on every rank of a warm pool, each against plain arithmetic on the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron.parallel import collectives
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology


def apply(
    name: str, parts: list[torch.Tensor], gradients: list[torch.Tensor], options: dict[str, bool]
) -> tuple[Any, Any]:
    """Result and input gradient of one collective on this rank, which is given one part and one output gradient."""
    groups = ProcessGroups.build(Topology(tp_size=len(parts)), **options)
    function: Callable[[torch.Tensor, ProcessGroups], torch.Tensor] = getattr(collectives, name)
    x = parts[groups.tp_rank].clone().requires_grad_()
    result = function(x * 1, groups)
    result.backward(gradients[groups.tp_rank])
    return result.detach(), x.grad
