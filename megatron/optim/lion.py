"""Lion: sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

Invariant: one state tensor per parameter, `exp_avg`, and decoupled weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """`p <- p - lr * (sign(b1 m + (1 - b1) g) + wd p)`, then `m <- b2 m + (1 - b2) g`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or not all(0.0 <= beta < 1.0 for beta in betas) or weight_decay < 0:
            raise ValueError(f"Lion: lr {lr} and weight_decay {weight_decay} must be >= 0, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            momenta = [self.state[p]["exp_avg"] for p in parameters]
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            updates = torch._foreach_lerp(momenta, gradients, 1.0 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1.0 - beta2)
        return loss
