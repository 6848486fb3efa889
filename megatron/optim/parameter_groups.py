"""Which parameters weight decay pulls at.

Decided by name alone, so that it is the same at every layout. Invariant: every trainable parameter lands in exactly one
group, in the given order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter

# Module names of normalisation layers, as they stand before the last dot of a parameter's name.
_NORM_MARKS = ("layernorm", "norm")


def decays(name: str) -> bool:
    """Whether weight decay applies: not to parameters of norms, nor to any named `bias`; to embeddings it does.

    Source: upstream's rule for its parameter groups.
    """
    module, _, own = name.rpartition(".")
    return own != "bias" and not module.rpartition(".")[2].endswith(_NORM_MARKS)


def parameter_groups(
    named: Iterable[tuple[str, Parameter]],
    weight_decay: float,
    lr_factor: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups, those with decay first; frozen parameters are left out.

    lr_factor: what a parameter's learning rate is multiplied with. A group carries it as `lr_factor`, for whoever sets
    the rate, and its decay is divided by it: the pull of a step is the rate times the decay, which stays what was set
    (Yang et al. 2022, arXiv 2203.03466, appendix B.3).
    """
    groups: dict[tuple[bool, float], list[Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((not decays(name), lr_factor(name)), []).append(parameter)
    # Sorted: a pipeline stage must have its groups in the same order as the others, whatever layers it holds.
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else weight_decay / key[1], "lr_factor": key[1]}
        for key in sorted(groups)
    ]
