"""A run whose saves are in the background, fail, or are cut off by a kill: nothing is lost and nothing is silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import find
from tests.integration.run_cases import checkpoint_tensors, train_run, write_config
from tests.integration.saving_cases import killed_at_every_operation, train_with_full_disk
from tests.unit.checkpoint.s3_server import S3Server

Ranks = Callable[..., list[Any]]


def equal(left: dict[Any, torch.Tensor], right: dict[Any, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(2, {"hidden_dropout": 0.1}), (4, {"model_parallel_size": 2, "pipe_parallel_size": 2})],
    ids=["dp2", "tp2-pp2"],
)
def test_background_saves_hold_what_saves_at_once_hold(
    ranks: Ranks, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    at_once = ranks(train_run, world_size, str(write_config(tmp_path, "once", checkpoint_factor=1, **changes)))
    config = write_config(
        tmp_path, "later", checkpoint_factor=1, async_save=True, keep_last_n_checkpoints=2,
        keep_checkpoint_every=3, **changes,
    )  # fmt: skip
    later = ranks(train_run, world_size, str(config))
    assert [result["losses"] for result in later] == [result["losses"] for result in at_once]
    assert sorted(path.name for path in (tmp_path / "later").glob("*global_step*")) == [
        "global_step3", "global_step5", "global_step6",
    ]  # fmt: skip
    for step in (3, 5, 6):
        assert equal(checkpoint_tensors(tmp_path / "later", step), checkpoint_tensors(tmp_path / "once", step))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_stops_the_run_or_not_as_configured(ranks: Ranks, tmp_path: Path, is_async: bool) -> None:
    changes = {"async_save": is_async, "on_save_failure": "stop"}
    results = ranks(train_with_full_disk, 2, str(write_config(tmp_path, "stop", **changes)), {4: 9})
    for result in results:
        assert "rank 1: no space left on the device while writing" in result["error"]
        assert (
            "Earlier checkpoints are untouched. The run stops here; with on_save_failure: continue" in result["error"]
        )
    assert find(tmp_path / "stop").step == 2
    assert not list((tmp_path / "stop").glob(".global*"))

    changes["on_save_failure"] = "continue"
    results = ranks(train_with_full_disk, 2, str(write_config(tmp_path, "go", **changes)), {4: 9})
    assert [result["error"] for result in results] == ["", ""]
    told = "\n".join(results[0]["messages"])
    assert "no space left" in told
    assert "Training goes on (on_save_failure: continue)" in told
    assert sorted(path.name for path in (tmp_path / "go").glob("*global_step*")) == ["global_step2", "global_step6"]

    # But the last save of a run is one that it owes.
    results = ranks(train_with_full_disk, 2, str(write_config(tmp_path, "end", **changes)), {6: 9})
    assert all("step 6 was not saved" in result["error"] for result in results)
    assert find(tmp_path / "end").step == 4


def test_a_failed_background_save_is_tried_again(ranks: Ranks, tmp_path: Path) -> None:
    config = write_config(tmp_path, async_save=True)
    results = ranks(train_with_full_disk, 2, str(config), {4: 2})
    assert [result["error"] for result in results] == ["", ""]
    told = "\n".join(results[0]["messages"])
    assert told.count("It is tried again in the background.") == 2
    assert "saved " in told
    assert sorted(path.name for path in (tmp_path / "run").glob("*global_step*")) == [
        "global_step2", "global_step4", "global_step6",
    ]  # fmt: skip


@pytest.mark.parametrize("is_async", [False, True])
def test_a_run_on_s3_goes_on_exactly(ranks: Ranks, tmp_path: Path, is_async: bool) -> None:
    """Saved to and continued from a bucket by two ranks; the same weights as on a disk."""
    whole = ranks(train_run, 2, str(write_config(tmp_path, "whole")))
    server = S3Server()
    environ = {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        where = {"save": "s3://bucket/run", "load": "s3://bucket/run", "log_dir": str(tmp_path / "log")}
        changes = {**where, "async_save": is_async, "keep_last_n_checkpoints": 2}
        ranks(train_run, 2, str(write_config(tmp_path, "s3", exit_interval=4, **changes)), environ=environ)
        resumed = ranks(train_run, 2, str(write_config(tmp_path, "s3", **changes)), environ=environ)
        assert [result["losses"] for result in resumed] == [result["losses"][4:] for result in whole]
        for name, data in server.objects.items():
            path = tmp_path / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    finally:
        server.close()
    copy = tmp_path / "copy" / "bucket" / "run"
    assert sorted(path.name for path in copy.iterdir()) == ["global_step4", "global_step6", "latest"]
    assert equal(checkpoint_tensors(copy), checkpoint_tensors(tmp_path / "whole"))


def test_an_unwritable_folder_shows_before_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path, save=str(tmp_path / "file" / "run"), load=None, log_dir=str(tmp_path / "log"))
    with pytest.raises(AssertionError, match=r"save: checkpoints cannot be written to .*file/run"):
        ranks(train_run, 2, str(config))


@pytest.mark.parametrize(
    ("is_async", "which"),
    [
        (False, "kinds"),
        (True, "half"),
        pytest.param(False, "all", marks=pytest.mark.full),
        pytest.param(True, "all", marks=pytest.mark.full),
    ],
)
def test_killed_at_any_operation_of_a_save(ranks: Ranks, tmp_path: Path, is_async: bool, which: str) -> None:
    """Kill -9; the run started again ends with the weights of the one that was left alone."""
    changes = {"async_save": is_async, "keep_last_n_checkpoints": 1}
    (result,) = ranks(
        killed_at_every_operation, 1, str(tmp_path), changes, which, timeout=900.0 if which == "all" else 240.0
    )
    expected = checkpoint_tensors(tmp_path / "whole", 6)
    operations, starts = result["operations"], result["starts"]
    published = next(i for i, o in enumerate(operations) if o.startswith("rename") and ".global_step4.tmp" in o)
    assert {2, 4} == set(starts.values())
    for count, start in starts.items():
        assert start == (4 if count > published else 2), f"killed after {operations[:count][-5:]}"
        assert equal(checkpoint_tensors(tmp_path / f"killed{count}", 6), expected)
