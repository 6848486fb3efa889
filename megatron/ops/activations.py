"""Activation functions by their configuration name.

Plain ones take one tensor; gated ones take the gate and the up projection and give `act(gate) * up`. This module holds
no weights. Invariant: `GATED` and `PLAIN` together are exactly the names that a configuration may give.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.common.errors import ConfigError


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, constants 0.79788456 and 0.044715 (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """The tensor itself: the bilinear unit has no non-linearity."""
    return x


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "softsign": F.softsign,
}

# Gated linear units, Shazeer 2020 (arXiv 2002.05202), section 2.
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
    "reglu": F.relu,
    "swiglu": F.silu,
    "bilinear": identity,
    "glu": torch.sigmoid,
}


def activation_function(name: str) -> Callable[..., Tensor]:
    """The function of that name: `f(x)` for a plain one, `f(gate, up) = act(gate) * up` for a gated one.

    Raises: ConfigError for an unknown name.
    """
    if name in PLAIN:
        return PLAIN[name]
    if name in GATED:
        act = GATED[name]
        return lambda gate, up: act(gate) * up
    raise ConfigError(f"activation = {name!r} is not known. Use one of: {', '.join(sorted({*PLAIN, *GATED}))}.")
