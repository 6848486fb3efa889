"""An optimizer from its configured name.

Plain torch optimizers only: nothing here makes DeepSpeed compile an extension. Invariant: what is built updates exactly
the parameters it is given; how they are sharded is the engine's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron.common.errors import ConfigError
from megatron.optim.lion import Lion
from megatron.optim.madgrad import Madgrad

SUPPORTED = ("adam", "adamw", "sgd", "lion", "madgrad_wd")


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    type: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
) -> torch.optim.Optimizer:
    """The optimizer `type` (any case) over parameter groups that carry their own weight_decay.

    adam, adamw: AdamW, decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2), fused where
    torch has a fused kernel for the device. Source: upstream's `Adam` decouples too, as its fused Adam does.
    sgd: plain or with momentum; its weight decay is the L2 term of torch.optim.SGD. lion:
    megatron.optim.lion. madgrad_wd: megatron.optim.madgrad.
    Raises: ConfigError for any other type.
    """
    name = type.lower()
    parameters = list(groups)
    if name in ("adam", "adamw"):
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, fused=_can_fuse(parameters))
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    if name == "lion":
        return Lion(parameters, lr=lr, betas=betas)
    if name == "madgrad_wd":
        return Madgrad(parameters, lr=lr, momentum=momentum, eps=eps)
    raise ConfigError(f"optimizer type {type!r} is not supported. Use one of: {', '.join(SUPPORTED)}.")


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's fused AdamW takes these parameters: ask it for one step on a copy of nothing much."""
    kinds = {(p.device, p.dtype) for group in groups for p in group["params"]}
    for device, dtype in kinds:
        probe = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        try:
            torch.optim.AdamW([probe], fused=True).step()
        except (RuntimeError, NotImplementedError):
            return False
    return True
