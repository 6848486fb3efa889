"""Which parameters weight decay pulls at.

Decided by name alone, so that it is the same at every layout. Invariant: every trainable parameter lands in exactly one
group, in the given order.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def parameter_groups(named: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer parameter groups with and without decay; an empty one is left out, frozen parameters too."""
    parameters = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in parameters if decays(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in parameters if not decays(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
