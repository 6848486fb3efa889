"""The anomaly policy on synthetic sequences, against plain recomputation from the whole history."""

from __future__ import annotations

import json
import math
import random

import pytest

from megatron.training.reliability.anomaly import AnomalyOptions, AnomalyPolicy, Decision

NAN, INF = float("nan"), float("inf")


def drive(policy: AnomalyPolicy, values: list[tuple[float, float]], first: int = 1) -> list[Decision]:
    """Feed (loss, gradient norm) as the loop does, up to the first decision that ends it."""
    decisions = []
    for step, (loss, norm) in enumerate(values, first):
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        is_skipped = not (is_finite and policy.accepts(loss, norm))
        decisions.append(policy.record(step, loss, norm, is_skipped=is_skipped))
        if decisions[-1].action in ("roll_back", "stop"):
            break
    return decisions


def middle(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def oracle(values: list[tuple[float, float]], options: AnomalyOptions) -> list[bool]:
    """Which steps are skipped, from the definition: the last `window` accepted values, their middle one, a factor."""
    accepted: list[tuple[float, float]] = []
    skipped = []
    for value in values:
        recent = accepted[-options.window :]
        bad = not all(map(math.isfinite, value))
        if not bad and len(recent) >= options.window / 4:
            for index, factor in enumerate((options.loss_factor, options.grad_norm_factor)):
                bad |= bool(factor) and value[index] > factor * middle([r[index] for r in recent])
        skipped.append(bad)
        if not bad:
            accepted.append(value)
    return skipped


@pytest.mark.parametrize("seed", range(20))
def test_leaps_are_found_as_by_definition(seed: int) -> None:
    generator = random.Random(seed)
    options = AnomalyOptions(
        skips_in_a_row=10**6,
        skips_in_window=None,
        window=generator.choice([1, 2, 7, 16, 33]),
        loss_factor=generator.choice([0.0, 1.2, 2.0]),
        grad_norm_factor=generator.choice([0.0, 1.5, 4.0]),
    )
    values = []
    for step in range(150):
        loss = 3 * math.exp(-step / 80) * generator.uniform(0.9, 1.1)
        norm = generator.lognormvariate(0, 0.3)
        if generator.random() < 0.1:
            loss, norm = generator.choice([(loss * 3, norm), (loss, norm * 8), (NAN, INF), (loss, INF), (INF, INF)])
        values.append((loss, norm))
    decisions = drive(AnomalyPolicy(options), values)
    assert [decision.action == "skip" for decision in decisions] == oracle(values, options)
    assert all(bool(decision.reason) == (decision.action == "skip") for decision in decisions)


def test_a_steady_run_is_left_alone() -> None:
    policy = AnomalyPolicy(AnomalyOptions(loss_factor=1.5, grad_norm_factor=3))
    assert {d.action for d in drive(policy, [(2.0 + 0.1 * math.sin(k), 1.0) for k in range(500)])} == {"go_on"}
    assert policy.num_skipped == 0


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_one_more_in_a_row_than_is_borne(limit: int) -> None:
    bad, good = (NAN, INF), (2.0, 1.0)
    policy = AnomalyPolicy(AnomalyOptions(skips_in_a_row=limit, skips_in_window=None, rollbacks=0))
    actions = [d.action for d in drive(policy, [*[bad] * limit, good, *[bad] * 20])]
    assert actions == ["skip"] * limit + ["go_on"] + ["skip"] * limit + ["stop"]
    assert policy.num_skipped == policy.num_not_finite == 2 * limit + 1


def test_too_many_in_the_window_though_never_in_a_row() -> None:
    options = AnomalyOptions(skips_in_a_row=3, skips_in_window=4, window=20, rollbacks=0)
    # Every sixth step is bad: four in any 20 steps are borne; every fourth is not.
    assert {d.action for d in drive(AnomalyPolicy(options), [(2, INF if k % 6 == 0 else 1) for k in range(200)])} == {
        "go_on",
        "skip",
    }
    policy = AnomalyPolicy(options)
    decisions = drive(policy, [(2, INF if k % 4 == 0 else 1) for k in range(200)])
    assert (len(decisions), decisions[-1].action) == (17, "stop")
    assert "5 bad steps among the last 20" in decisions[-1].reason
    assert "anomaly_skips_in_window: 4" in decisions[-1].reason
    assert policy.first_bad_step == 1


def test_a_falling_loss_scale_counts_for_nothing_but_the_total() -> None:
    policy = AnomalyPolicy(AnomalyOptions(skips_in_a_row=1))
    for step in range(1, 40):
        assert policy.record(step, 2.0, INF, is_skipped=True, is_scale_lowered=True).action == "go_on"
    assert (policy.num_skipped, policy.num_not_finite, policy.first_bad_step) == (39, 0, None)


def test_rollbacks_are_limited_until_the_run_has_gone_well_for_a_window() -> None:
    options = AnomalyOptions(skips_in_a_row=0, rollbacks=2, window=5)
    policy = AnomalyPolicy(options)
    bad, good = (NAN, INF), (2.0, 1.0)
    saved = json.loads(json.dumps(policy.state()))
    for _ in range(2):
        assert drive(policy, [*[good] * 4, bad])[-1].action == "roll_back"
        assert policy.first_bad_step == 5
        policy.rolled_back(saved)
        assert policy.first_bad_step is None
    assert (policy.rollbacks, policy.recent_rollbacks, policy.num_skipped) == (2, 2, 2)
    assert drive(policy, [*[good] * 5, bad])[-1].action == "roll_back"
    policy.rolled_back(None)
    assert (policy.rollbacks, policy.recent_rollbacks) == (3, 1)


@pytest.mark.parametrize("cut", [1, 17, 63])
def test_a_continued_run_decides_as_the_uninterrupted_one(cut: int) -> None:
    generator = random.Random(cut)
    options = AnomalyOptions(skips_in_a_row=3, window=12, loss_factor=1.3, grad_norm_factor=2)
    values = [(generator.lognormvariate(1, 0.2), generator.choice([1.0, 1.5, 4.0, INF])) for _ in range(100)]
    whole = AnomalyPolicy(options)
    expected = [d.action for d in drive(whole, values)]
    before, after = AnomalyPolicy(options), AnomalyPolicy(options)
    actions = [d.action for d in drive(before, values[:cut])]
    after.restore(json.loads(json.dumps(before.state())))
    actions += [d.action for d in drive(after, values[cut:], cut + 1)]
    assert actions[: len(expected)] == expected
    assert "skip" in expected


def test_the_reason_says_what_was_measured_and_which_key_bounds_it() -> None:
    policy = AnomalyPolicy(AnomalyOptions(window=4, loss_factor=2, skips_in_a_row=1, rollbacks=0))
    decisions = drive(policy, [(2.0, 1.0)] * 4 + [(9.0, 1.0)] * 2)
    assert decisions[-2] == Decision("skip", "the loss 9 is 4.5 times the median 2 of 4 steps (at most 2)")
    assert decisions[-1].reason.endswith("; 2 bad steps in a row (anomaly_skips_in_a_row: 1)")
