"""Steps that overflow in fp16 are skipped by all ranks alike, and nothing moves in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.layout_cases import Case
from tests.distributed.overflow_cases import overflowing


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "zero_stage": 2}])
def test_overflowed_steps_are_skipped_on_all_ranks(ranks: Callable[..., list[Any]], layout: dict[str, Any]) -> None:
    case = Case(**layout, precision="fp16", initial_scale_power=30, steps=18)
    first, *others = ranks(overflowing, case.world_size, case, timeout=120)
    assert all(other["skipped"] == first["skipped"] and other["scales"] == first["scales"] for other in others)
    # The scale halves until a step fits; from there on every step counts.
    num_skipped = sum(first["skipped"])
    assert 2 <= num_skipped < case.steps - 2
    assert first["skipped"] == [True] * num_skipped + [False] * (case.steps - num_skipped)
    assert first["scales"][-1] == 2.0 ** (30 - num_skipped)
    assert first["optimizer_steps"] == case.steps - num_skipped
    assert all(result["kept"] == result["skipped"] for result in [first, *others])
