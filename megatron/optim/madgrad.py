"""MADGRAD with decoupled weight decay (Defazio & Jelassi 2021, arXiv 2101.11075, algorithm 1).

Invariant: three state tensors per parameter, and elementwise throughout, so that a partition is updated as the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Madgrad(torch.optim.Optimizer):
    """`s += a g`, `v += a g^2` with `a = lr sqrt(t)`; `z = x0 - s / (v^(1/3) + eps)`; `p <- m p + (1 - m) z`.

    Weight decay is decoupled, as upstream's madgrad_wd has it: `lr wd p` of the parameter before the step is taken off
    after it. Steps t count from 1; x0 is the parameter before the first.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        if lr < 0 or not 0.0 <= momentum < 1.0 or weight_decay < 0 or eps < 0:
            raise ValueError(
                f"Madgrad: lr {lr}, weight_decay {weight_decay}, eps {eps} >= 0; momentum {momentum} in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        # No step made: states of zeros are those of a run that was taken back to its beginning.
        if "x0" not in state or state.get("step", 0) == 0:
            state["step"] = torch.zeros(())
            state["grad_sum"] = torch.zeros_like(parameter)
            state["grad_sum_sq"] = torch.zeros_like(parameter)
            state["x0"] = parameter.detach().clone()
        state["step"] += 1
        weight = group["lr"] * float(state["step"]) ** 0.5
        state["grad_sum"].add_(gradient, alpha=weight)
        state["grad_sum_sq"].addcmul_(gradient, gradient, value=weight)
        root = state["grad_sum_sq"].pow(1 / 3).add_(group["eps"])
        # An element that never had a gradient stays where it began, also with eps 0.
        goal = state["x0"] - torch.where(root > 0, state["grad_sum"] / root, 0.0)
        decay = parameter * (group["lr"] * group["weight_decay"])
        parameter.lerp_(goal, 1.0 - group["momentum"]).sub_(decay)
