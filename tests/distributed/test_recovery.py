"""Bad data in a whole run: skipped, rolled back from, or stopped at, with a checkpoint that can be continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import find
from megatron.observe.metrics_log import read_metrics
from tests.distributed.recovery_cases import run_over
from tests.integration.run_cases import checkpoint_tensors, write_config

Ranks = Callable[..., list[Any]]
BATCH = 8
BAD = (4 * BATCH, 7 * BATCH)  # the data of steps 5, 6 and 7
SETTINGS = {"train_iters": 10, "eval_iters": 0, "hidden_dropout": 0.1, "anomaly_skips_in_a_row": 2}


def _equal(one: Path, step: int, other: Path, other_step: int) -> bool:
    a, b = checkpoint_tensors(one, step), checkpoint_tensors(other, other_step)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


OFFLOADED = {"device": "cpu"}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"pipe_parallel_size": 2, "precision": "bfloat16"},
        {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOADED}},
        pytest.param({"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOADED}}, marks=pytest.mark.full),
        {"lora_rank": 4, "async_save": True},
    ],
)
def test_a_run_rolls_back_and_passes_over_the_bad_data(ranks: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    path = write_config(tmp_path, **SETTINGS, **layout)
    results = ranks(run_over, 2, str(path), BAD, timeout=120)
    for result in results:
        assert (result["code"], result["skipped"], result["rollbacks"]) == (0, 3, 1), result
        assert result["samples"] == [*range(0, 7 * BATCH, BATCH), *range(7 * BATCH, 13 * BATCH, BATCH)]
        assert result["position"]["step"] == 10
    said = "\n".join(results[0]["said"])
    assert "step 5 skipped: the loss is nan; " in said
    assert (
        "rolled back to step 4; the data goes on at sample 56, behind the bad steps (roll-back 1 of at most 1)" in said
    )
    # Replica 0 (and the pipeline's only one) names its samples of step 5, some or all of 32 to 39.
    assert "samples of replica 0: 32, 33" in said
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert log[10]["train/skipped_steps"] == 3
    # The oracle: a run that goes on from step 4 with the data behind, and never saw the bad one.
    oracle = write_config(tmp_path, "oracle", **SETTINGS, **layout, load=str(tmp_path / "run"), iteration=4)
    ranks(run_over, 2, str(oracle), None, 7 * BATCH, timeout=120)
    assert _equal(tmp_path / "run", 10, tmp_path / "oracle", 10)


def test_where_a_roll_back_goes_to_is_not_removed_meanwhile(ranks: Ranks, tmp_path: Path) -> None:
    """Saved after every step, two are kept: those of the bad steps 5 and 6 would have taken the place of step 4."""
    frequent = {**SETTINGS, "checkpoint_factor": 1}
    ranks(run_over, 1, str(write_config(tmp_path, "all", **frequent)), BAD, timeout=120)
    path = write_config(tmp_path, **frequent, keep_last_n_checkpoints=1)
    (result,) = ranks(run_over, 1, str(path), BAD, timeout=120)
    assert (result["code"], result["rollbacks"]) == (0, 1)
    assert any("rolled back to step 4;" in said for said in result["said"])
    assert sorted(path.name for path in (tmp_path / "run").glob("global_step*")) == ["global_step10", "global_step9"]
    assert _equal(tmp_path / "run", 10, tmp_path / "all", 10)


def test_a_run_that_cannot_get_past_stops_with_a_checkpoint_from_before(ranks: Ranks, tmp_path: Path) -> None:
    path = write_config(tmp_path, **SETTINGS, anomaly_skip_data=False)
    first, second = ranks(run_over, 2, str(path), BAD, timeout=120)
    assert first["code"] == second["code"] == 6
    assert first["error"] == second["error"]
    assert "step 7: the loss is nan; 3 bad steps in a row (anomaly_skips_in_a_row: 2)." in first["error"]
    assert "Rolled back already (anomaly_rollbacks: 1)" in first["error"]
    assert first["samples"] == [k * BATCH for k in [*range(7), 4, 5, 6]]
    assert find(tmp_path / "run").step == 7
    assert _equal(tmp_path / "run", 7, tmp_path / "run", 4)
    (again,) = ranks(run_over, 1, str(path), BAD, timeout=120)
    assert (again["code"], again["samples"]) == (0, [7 * BATCH, 8 * BATCH, 9 * BATCH])


@pytest.mark.parametrize(
    ("full_at", "told"),
    [
        # Still being written when the run rolls back: that it failed stops the run there as anywhere else.
        (".global_step6.tmp/rank", "step 6 was not saved"),
        ("roll-back", "latest cannot be set to step 4, from which the run would go on: "),
    ],
)
def test_a_roll_back_with_a_full_disk_ends_on_all_ranks(ranks: Ranks, tmp_path: Path, full_at: str, told: str) -> None:
    path = write_config(tmp_path, **SETTINGS, async_save=True)
    results = ranks(run_over, 2, str(path), BAD, None, full_at, timeout=120)
    assert [result["code"] for result in results] == [5, 5]
    for result in results:
        assert told in result["error"]
        assert "no space" in result["error"].lower()
        assert result["rollbacks"] == 0
        assert len(result["samples"]) == 7


def test_without_anything_to_go_back_to_it_stops_and_saves(ranks: Ranks, tmp_path: Path) -> None:
    path = write_config(tmp_path, **{**SETTINGS, "checkpoint_factor": 100, "train_iters": 8})
    (result,) = ranks(run_over, 1, str(path), (0, 5 * BATCH), timeout=120)
    assert result["code"] == 6
    assert "There is no checkpoint from before them to go back to." in result["error"]
    assert find(tmp_path / "run").step == 3
    path = write_config(tmp_path, "bare", **{**SETTINGS, "checkpoint_factor": None, "save": None, "load": None})
    (result,) = ranks(run_over, 1, str(path), (0, 5 * BATCH), timeout=120)
    assert result["code"] == 6
    assert "no save folder" in result["error"]


def test_a_bad_step_now_and_then_is_only_skipped(ranks: Ranks, tmp_path: Path) -> None:
    path = write_config(tmp_path, **SETTINGS)
    (result,) = ranks(run_over, 1, str(path), (35, 36), timeout=120)
    assert (result["code"], result["skipped"], result["rollbacks"]) == (0, 1, 0)
    # Of four micro-batches of two samples one is bad; it alone is named.
    assert any(said.endswith("samples of replica 0: 34, 35; 1 skipped so far") for said in result["said"])
    # A later part of the run goes on counting.
    path = write_config(tmp_path, **{**SETTINGS, "train_iters": 12})
    (result,) = ranks(run_over, 1, str(path), None, timeout=120)
    assert result["skipped"] == 1


def test_an_overflow_at_the_least_loss_scale_is_an_anomaly(ranks: Ranks, tmp_path: Path) -> None:
    block = {"enabled": True, "initial_scale_power": 31, "min_loss_scale": 2.0**30, "hysteresis": 1}
    path = write_config(tmp_path, **SETTINGS, fp16=block, anomaly_rollbacks=0)
    first, second = ranks(run_over, 2, str(path), None, timeout=120)
    assert first["code"] == second["code"] == 6
    # The first step lowers the scale; the three after it cannot.
    assert "step 4: the gradient norm is not finite; 3 bad steps in a row" in first["error"]
    assert (first["skipped"], first["position"]["step"]) == (4, 4)


def test_leaps_are_skipped_and_a_continued_run_skips_the_same(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"anomaly_window": 4, "anomaly_grad_norm_factor": 1.01, "anomaly_skips_in_a_row": 100}
    changes |= {"anomaly_skips_in_window": None, "checkpoint_factor": 5, "eval_iters": 0, "train_iters": 16}
    ranks(run_over, 2, str(write_config(tmp_path, "whole", **changes)), None, timeout=120)
    part = {**changes, "exit_interval": 5}
    for _ in range(4):
        last = ranks(run_over, 2, str(write_config(tmp_path, "parts", **part)), None, timeout=120)[0]
    assert last["position"]["step"] == 16
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    # The oracle: the middle of the last four accepted norms, times the factor.
    accepted: list[float] = []
    num_skipped = 0
    for step in range(1, 17):
        norm, recent = whole[step]["train/grad_norm"], sorted(accepted[-4:])
        middle = (recent[(len(recent) - 1) // 2] + recent[len(recent) // 2]) / 2 if recent else float("inf")
        num_skipped += norm > 1.01 * middle
        if norm <= 1.01 * middle:
            accepted.append(norm)
        for log in (whole, parts):
            assert log[step].get("train/skipped_steps", 0) == num_skipped
        assert parts[step]["train/grad_norm"] == norm
    assert 0 < num_skipped < 16
    assert _equal(tmp_path / "whole", 16, tmp_path / "parts", 16)
