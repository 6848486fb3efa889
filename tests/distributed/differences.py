"""How far a run on several ranks is from the oracle: one number per quantity, and the tensor that is farthest off.

Invariant: a quantity that is missing, or not finite, is infinitely far off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.distributed.layout_cases import Case, assemble, train_case
from tests.distributed.oracle import KINDS

Ranks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Differences:
    """Largest relative differences over all steps, ranks, tensors and elements.

    loss, norm: relative. weight, exp_avg, exp_avg_sq: relative to the largest element of the logical tensor. Units:
    none. worst: per kind, the tensor with the largest difference.
    """

    loss: float
    norm: float
    weight: float
    exp_avg: float
    exp_avg_sq: float
    worst: dict[str, str]

    @property
    def numbers(self) -> dict[str, float]:
        """All of them by name."""
        return {name: getattr(self, name) for name in ("loss", "norm", *KINDS)}


def differences(results: list[dict[str, Any]], reference: dict[str, Any]) -> Differences:
    """Compare what all ranks of one run returned with `oracle_run`'s result."""
    loss = max(
        relative(ours, theirs)
        for result in results
        for ours, theirs in zip(
            [*result["losses"], result["valid"]], [*reference["losses"], reference["valid"]], strict=True
        )
    )
    norm = max(
        relative(ours, theirs)
        for result in results
        for ours, theirs in zip(result["norms"], reference["norms"], strict=True)
    )
    largest, worst = {}, {}
    for kind in KINDS:
        mine, theirs = assemble(results, kind), reference[kind]
        if mine.keys() != theirs.keys():
            raise AssertionError(f"{kind}: other tensors than the oracle's: {sorted(mine.keys() ^ theirs.keys())}")
        by_name = {name: tensor_difference(mine[name], tensor) for name, tensor in theirs.items()}
        worst[kind] = max(by_name, key=lambda name: by_name[name])
        largest[kind] = by_name[worst[kind]]
    return Differences(loss, norm, **largest, worst=worst)


def relative(ours: float, theirs: float) -> float:
    """|ours - theirs| / |theirs|, and 0 where both are 0."""
    if ours == theirs:
        return 0.0
    value = abs(ours - theirs) / abs(theirs) if theirs else math.inf
    return value if math.isfinite(value) else math.inf


def tensor_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of two elements over the largest element."""
    if ours.shape != theirs.shape:
        return math.inf
    return relative(float((ours.double() - theirs).abs().max() + theirs.abs().max()), float(theirs.abs().max()))


def run_and_compare(ranks: Ranks, case: Case, reference: dict[str, Any]) -> Differences:
    """Train the case on its ranks and compare."""
    return differences(ranks(train_case, case.world_size, case, timeout=120), reference)
