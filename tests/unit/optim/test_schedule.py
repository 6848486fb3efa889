"""The learning rate, value by value and as properties over all steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.optim.schedule import LearningRateSchedule

STYLES = ["constant", "linear", "cosine", "exponential"]


def test_warmup_is_linear_and_its_first_step_is_not_zero() -> None:
    schedule = LearningRateSchedule(1.0, "cosine", decay_iters=100, warmup=0.1)
    assert [schedule.lr_at(step) for step in (0, 1, 2, 5, 10)] == pytest.approx([0.1, 0.1, 0.2, 0.5, 1.0])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.75, 0.5, 0.1, 0.1]),
        ("cosine", [0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1, 0.1]),
        ("exponential", [math.exp(-0.693 / 4), math.exp(-0.693 / 2), math.exp(-0.693), math.exp(-0.693 * 2)]),
    ],
)
def test_decay_after_warmup(style: str, expected: list[float]) -> None:
    schedule = LearningRateSchedule(1.0, style, decay_iters=100, min_lr=0.1, warmup=0.2)  # type: ignore[arg-type]
    # A quarter, a half, all and twice of the decay from step 20 to step 100.
    assert [schedule.lr_at(step) for step in (40, 60, 100, 180)] == pytest.approx(expected)


def test_cosine_stays_at_the_floor_past_its_end() -> None:
    schedule = LearningRateSchedule(1e-3, "cosine", decay_iters=50, min_lr=1e-4)
    assert all(schedule.lr_at(step) == pytest.approx(1e-4) for step in range(50, 200))


def test_a_warmup_below_one_step_has_no_peak() -> None:
    schedule = LearningRateSchedule(1e-3, "cosine", decay_iters=20, warmup=0.01)
    assert schedule.warmup_steps == 0.2
    assert schedule.lr_at(0) <= 1e-3


@given(
    st.sampled_from(STYLES),
    st.floats(1e-8, 10),
    st.floats(0, 1),
    st.integers(1, 10**6),
    st.floats(0, 1),
    st.integers(0, 2 * 10**6),
)
def test_rate_stays_in_bounds(style: str, lr: float, floor: float, iters: int, warmup: float, step: int) -> None:
    schedule = LearningRateSchedule(lr, style, iters, floor * lr, warmup)  # type: ignore[arg-type]
    rate = schedule.lr_at(step)
    assert 0 < rate <= lr * (1 + 1e-12) or (rate == 0 and floor * lr == 0)
    if step > schedule.warmup_steps:
        assert rate >= schedule.min_lr * (1 - 1e-12)
        assert schedule.lr_at(step + 1) <= rate * (1 + 1e-12)


@pytest.mark.parametrize(
    "change", [{"style": "triangle"}, {"min_lr": 2.0}, {"min_lr": -1.0}, {"decay_iters": 0}, {"warmup": 1.5}]
)
def test_impossible_values_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"lr|warmup"):
        LearningRateSchedule(**{"lr": 1.0, **change})  # type: ignore[arg-type]
