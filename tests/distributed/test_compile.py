"""torch.compile of the blocks changes the speed and nothing else, also with tensor-parallel ranks and stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.layout_cases import Case, train_case


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=["one", "tp2-sp", "pp2"])
def test_compiled_blocks_train_the_same_model(ranks: Callable[..., list[Any]], layout: dict[str, Any]) -> None:
    case = Case(**layout, steps=4)
    plain = ranks(train_case, case.world_size, case, timeout=120)[0]
    compiled = ranks(train_case, case.world_size, replace(case, compile_blocks=True), timeout=300)[0]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert compiled["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert compiled["valid"] == pytest.approx(plain["valid"], rel=1e-6)
