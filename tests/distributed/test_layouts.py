"""Any layout trains the same model as one process: losses, gradient norms and every updated parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.layout_cases import Case, assemble, train_case

Ranks = Callable[..., list[Any]]

# fp32 sums in another order: a few units in the last place per step, and Adam divides by the square root of tiny second
# moments, which magnifies them where gradients are near zero.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-5

LAYOUTS = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-dp2": {"tp": 2, "dp": 2},
    "pp2-dp2": {"pp": 2, "dp": 2},
    "dp2-zero2": {"dp": 2, "zero_stage": 2},
    "dp4-no-accumulation": {"dp": 4},
    "tp4": {"tp": 4},
    "pp4": {"pp": 4},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "tp2-pp2-sp": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "tp4-sp": {"tp": 4, "sequence_parallel": True},
    "tp2-dp2-sp": {"tp": 2, "dp": 2, "sequence_parallel": True},
}

MODELS = {
    "neox": {},
    "tied-sequential": {"residual": "sequential", "tied_head": True},
    "learned-tied": {"residual": "sequential", "tied_head": True, "position": "learned", "rotary_dims": 0},
    "gqa-swiglu-rmsnorm": {
        "residual": "sequential",
        "num_kv_heads": 2,
        "activation": "swiglu",
        "norm": "rmsnorm",
        "attention_bias": False,
        "mlp_bias": False,
    },
}


def _check(ranks: Ranks, reference: dict[str, Any], case: Case) -> None:
    results = ranks(train_case, case.world_size, case, timeout=120)
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=LOSS_TOLERANCE)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        assert result["valid"] == pytest.approx(reference["valid"], rel=LOSS_TOLERANCE)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        mine, theirs = assemble(results, kind), reference[kind]
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(
                tensor,
                theirs[name],
                rtol=0.0,
                atol=WEIGHT_TOLERANCE,
                msg=lambda text, name=name, kind=kind: f"{name} ({kind}): {text}",
            )


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> Callable[[Case], dict[str, Any]]:
    """The run of one process, once for every set of options that does not change the mathematics."""

    @cache
    def run(model: str, normalization: str, is_masked: bool) -> dict[str, Any]:
        case = Case(spec=MODELS[model], normalization=normalization, is_masked=is_masked)
        (result,) = ranks(train_case, 1, case, timeout=120)
        kinds = {kind: assemble([result], kind) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        return {**result, **kinds}

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(ranks: Ranks, reference: Callable[..., dict[str, Any]], layout: str) -> None:
    case = Case(**LAYOUTS[layout])
    _check(ranks, reference("neox", "micro_batch", False), case)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "neox"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2-pp2", "tp4", "tp2-pp2-sp"])
def test_other_models(ranks: Ranks, reference: Callable[..., dict[str, Any]], layout: str, model: str) -> None:
    case = Case(**LAYOUTS[layout], spec=MODELS[model])
    _check(ranks, reference(model, "micro_batch", False), case)


@pytest.mark.parametrize("layout", ["dp2", "tp2-pp2", "dp4-no-accumulation"])
def test_token_mean_under_uneven_masks(ranks: Ranks, reference: Callable[..., dict[str, Any]], layout: str) -> None:
    """loss_normalization: tokens gives one global mean, even where a whole micro-batch is masked."""
    case = Case(**LAYOUTS[layout], normalization="tokens", is_masked=True)
    _check(ranks, reference("neox", "tokens", True), case)


def test_token_mean_does_not_depend_on_accumulation(ranks: Ranks, reference: Callable[..., dict[str, Any]]) -> None:
    case = Case(normalization="tokens", is_masked=True, micro_batch=8)
    _check(ranks, reference("neox", "tokens", True), case)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"tp": 2, "pp": 2}])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_is_bitwise_the_same(ranks: Ranks, layout: dict[str, Any], dropout: float) -> None:
    """Also with dropout: the second forward pass draws the same masks, on divided and on replicated tensors."""
    spec = {"hidden_dropout": dropout, "attention_dropout": dropout}
    kept, again = (
        ranks(
            train_case, Case(**layout).world_size, Case(**layout, spec=spec, steps=6, recompute=recompute), timeout=120
        )
        for recompute in (False, True)
    )
    assert [result["losses"] for result in kept] == [result["losses"] for result in again]
    assert all(result["losses"] == kept[0]["losses"] for result in kept)


@pytest.mark.parametrize(("precision", "spread"), [("bfloat16", 5e-3), ("fp16", 2e-3)])
@pytest.mark.parametrize("layout", ["dp2", "tp2-pp2"])
def test_half_precision_stays_near_fp32(
    ranks: Ranks, reference: Callable[..., dict[str, Any]], layout: str, precision: str, spread: float
) -> None:
    """bf16 keeps 8 bits and fp16 11 bits of mantissa: losses differ in the third digit, not more (deepspeed.md 2)."""
    results = ranks(
        train_case, Case(**LAYOUTS[layout]).world_size, Case(**LAYOUTS[layout], precision=precision), timeout=120
    )
    assert results[0]["losses"] == pytest.approx(reference("neox", "micro_batch", False)["losses"], rel=spread)
    assert results[0]["losses"] == results[-1]["losses"]
