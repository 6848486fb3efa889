import pytest

from megatron.training.plan import RunPlan, SaveSchedule


def _plan(**changes: object) -> RunPlan:
    values: dict[str, object] = {
        "train_iters": 10,
        "global_batch_size": 4,
        "seq_length": 8,
        "eval_interval": 3,
        "eval_iters": 1,
        "log_interval": 1,
        "exit_interval": None,
        "saves": SaveSchedule(),
    }
    return RunPlan(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (SaveSchedule("linear", 4), [4, 8]),
        (SaveSchedule("log", 2), [1, 2, 4, 8]),
        (SaveSchedule("log", 1.5), [1, 2, 3, 5, 7]),
        (SaveSchedule("linear", None, extra=(0, 7)), [0, 7]),
        (SaveSchedule("linear", 5, extra=(1,)), [1, 5, 10]),
    ],
)
def test_save_steps(schedule: SaveSchedule, expected: list[int]) -> None:
    assert [step for step in range(11) if schedule.is_due(step)] == expected


def test_the_end_is_validated_and_saved_once_however_the_interval_falls() -> None:
    plan = _plan()
    assert [step for step in range(1, 11) if plan.validates_at(step)] == [3, 6, 9, 10]
    assert [step for step in range(1, 11) if plan.saves_at(step)] == [10]
    assert not any(_plan(eval_iters=0).validates_at(step) for step in range(1, 11))


def test_leaving_early_saves_first() -> None:
    plan = _plan(exit_interval=4)
    assert [step for step in range(1, 11) if plan.exits_at(step)] == [4, 8]
    assert all(plan.saves_at(step) for step in (4, 8, 10))


def test_tokens_per_step() -> None:
    assert _plan().tokens_per_step == 32
