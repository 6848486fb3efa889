"""Training runs as a user starts them: they log, validate, save, resume exactly, and refuse what cannot go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.run_cases import checkpoint_tensors, train_run, write_config, write_dataset
from tests.pool import RankFailure

Ranks = Callable[..., list[Any]]

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2-pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
    "dp2-zero3": (2, {"zero_optimization": {"stage": 3}}),
    "tp2-sp": (2, {"model_parallel_size": 2, "sequence_parallel": True, "seq_length": 10, "precision": "bfloat16"}),
    "dp2-dropout": (2, {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
}


def _equal(left: dict[Any, torch.Tensor], right: dict[Any, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_step_and_started_again_is_the_same_run(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    whole = ranks(train_run, world_size, str(write_config(tmp_path, "whole", **changes)))
    expected = checkpoint_tensors(tmp_path / "whole")
    for kill_after in (1, 3, 5) if layout == "dp2" else (3,):
        config = write_config(tmp_path, f"killed{kill_after}", **changes)
        with pytest.raises(RankFailure):
            ranks(train_run, world_size, str(config), kill_after)
        resumed = ranks(train_run, world_size, str(config))
        start = kill_after - kill_after % 2
        assert resumed[0]["start"] == start
        assert [r["losses"] for r in resumed] == [r["losses"][start:] for r in whole]
        assert [r["samples"] for r in resumed] == [r["samples"][start:] for r in whole]
        assert _equal(checkpoint_tensors(tmp_path / f"killed{kill_after}"), expected)


def test_goes_on_at_other_layouts_with_the_same_samples(ranks: Ranks, tmp_path: Path) -> None:
    """One process, then tensor and pipeline parallel, then ZeRO 3 on two replicas: one run."""
    whole = ranks(train_run, 1, str(write_config(tmp_path, "whole")))[0]
    ranks(train_run, 1, str(write_config(tmp_path, "moved", exit_interval=2)))
    across = {"model_parallel_size": 2, "pipe_parallel_size": 2}
    middle = ranks(train_run, 4, str(write_config(tmp_path, "moved", exit_interval=4, **across)))[0]
    last = ranks(train_run, 2, str(write_config(tmp_path, "moved", zero_optimization={"stage": 3})))
    assert (middle["start"], last[0]["start"]) == (2, 4)
    assert middle["losses"] + last[0]["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    assert middle["samples"] == whole["samples"][2:4]
    assert [sorted(a + b) for a, b in zip(*(result["samples"] for result in last), strict=True)] == whole["samples"][4:]


def test_log_and_checkpoints_of_a_run(ranks: Ranks, tmp_path: Path) -> None:
    result = ranks(train_run, 2, str(write_config(tmp_path)))[0]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {record["step"]: record["train/lm_loss"] for record in records if "train/lm_loss" in record}
    assert list(logged.values()) == pytest.approx(result["losses"])
    assert [record["step"] for record in records if "validation/lm_loss" in record] == [3, 6]
    assert [record["step"] for record in records if "test/lm_loss" in record] == [6]
    assert sorted(path.name for path in (tmp_path / "run").glob("global_step*")) == [
        "global_step2",
        "global_step4",
        "global_step6",
    ]
    assert (tmp_path / "run" / "global_step6" / "configs" / "run.yml").read_text() == (tmp_path / "run.yml").read_text()


def test_validation_does_not_change_training(ranks: Ranks, tmp_path: Path) -> None:
    validated = ranks(train_run, 1, str(write_config(tmp_path, "validated", eval_interval=1)))[0]
    silent = ranks(train_run, 1, str(write_config(tmp_path, "silent", eval_iters=0)))[0]
    assert validated["losses"] == silent["losses"]


def test_a_finished_run_started_again_does_nothing(ranks: Ranks, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    ranks(train_run, 1, config)
    before = checkpoint_tensors(tmp_path / "run")
    assert ranks(train_run, 1, config)[0]["losses"] == []
    assert _equal(checkpoint_tensors(tmp_path / "run"), before)


def test_nothing_to_load_is_an_error_unless_a_fresh_start_is_allowed(ranks: Ranks, tmp_path: Path) -> None:
    config = write_config(tmp_path, allow_fresh_start=None, load=str(tmp_path / "elsewhere"))
    with pytest.raises(RankFailure, match="elsewhere does not exist"):
        ranks(train_run, 1, str(config))


def test_changed_data_or_model_is_refused_with_the_difference(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train_run, 1, str(write_config(tmp_path, train_iters=2)))
    wider = write_config(tmp_path, train_iters=2, num_layers=3)
    with pytest.raises(RankFailure, match="num_layers: checkpoint 2, config 3"):
        ranks(train_run, 1, str(wider))
    write_dataset(tmp_path, num_documents=61, seed=6)
    with pytest.raises(RankFailure, match=r"train data has changed: .*tokens: .*the content of the data files"):
        ranks(train_run, 1, str(write_config(tmp_path, train_iters=4)))
    # The weights alone may go on to other data.
    tuned = ranks(train_run, 1, str(write_config(tmp_path, train_iters=4, finetune=True)))[0]
    assert tuned["start"] == 0


def test_optimizer_states_on_the_cpu_change_nothing(ranks: Ranks, tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        block: dict[str, Any] = {"stage": stage}
        kept = ranks(train_run, 2, str(write_config(tmp_path, f"kept{stage}", zero_optimization=block)))
        block = {**block, "offload_optimizer": {"device": "cpu"}}
        away = ranks(train_run, 2, str(write_config(tmp_path, f"away{stage}", zero_optimization=block)))
        # Stage 3 with offload reduces gradients in another order. At stages 1 and 2 nothing changes with the pinned
        # torch; with 2.11 losses differed by one unit in the last place, for a reason not looked into.
        is_exact = stage < 3 and torch.__version__ >= (2, 13)
        for there, here in zip(away, kept, strict=True):
            assert there["losses"] == pytest.approx(here["losses"], rel=0.0 if is_exact else 1e-6, abs=0.0)
        there, here = checkpoint_tensors(tmp_path / f"away{stage}"), checkpoint_tensors(tmp_path / f"kept{stage}")
        torch.testing.assert_close(there, here, rtol=0.0, atol=0.0 if is_exact else 5e-6)


def test_epochs_decide_the_number_of_steps(ranks: Ranks, tmp_path: Path) -> None:
    config = write_config(tmp_path, train_iters=None, train_epochs=2, eval_interval=100, checkpoint_factor=100)
    (result,) = ranks(train_run, 1, str(config))
    seen = [sample for step in result["samples"] for sample in step]
    assert len(result["losses"]) == len(seen) // 8 > 10
    assert seen == list(range(len(seen)))
