"""A stop signal in every phase: the documented exit code, one checkpoint at the current step, the same run after it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import find
from tests.integration.run_cases import checkpoint_tensors, write_config
from tests.integration.signal_cases import stopped_run

Ranks = Callable[..., list[Any]]

# Validations at 3 and 6 of three batches each, at 6 the test as well; saves at 4 and 6. Dropout: random states matter.
CHANGES = {"hidden_dropout": 0.1, "eval_iters": 3, "checkpoint_factor": 4}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"model_parallel_size": 2}),
    "pp2": (2, {"pipe_parallel_size": 2}),
    "zero3": (2, {"zero_optimization": {"stage": 3}}),
}
# phase, which call of what it does gets the signal, the step after which the run stops
MOMENTS = {
    "first-step": ("train", 1, 1),
    "before-validation": ("train", 3, 3),
    "before-save": ("train", 4, 4),
    "last-step": ("train", 6, 6),
    "validation-begins": ("validate", 1, 3),
    "validation": ("validate", 2, 3),
    "last-validation": ("validate", 4, 6),
    "test": ("validate", 8, 6),
    "save": ("save", 1, 4),
    "last-save": ("save", 2, 6),
}
CASES = [("dp2", moment) for moment in MOMENTS]
CASES += [(layout, moment) for layout in ("one", "tp2", "pp2", "zero3") for moment in ("validation", "save")]


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """An uninterrupted run at a layout."""
    runs: dict[str, dict[str, Any]] = {}

    def get(layout: str) -> dict[str, Any]:
        if layout not in runs:
            world_size, changes = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp(layout)
            results = ranks(stopped_run, world_size, str(write_config(folder, "whole", **CHANGES, **changes)), "never")
            assert results[0]["code"] == 0
            runs[layout] = {
                "folder": folder,
                "losses": [result["losses"] for result in results],
                "tensors": checkpoint_tensors(folder / "whole"),
                "log": _log(folder / "whole"),
            }
        return runs[layout]

    return get


@pytest.mark.parametrize(("layout", "moment"), CASES)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    whole: Callable[[str], dict[str, Any]], ranks: Ranks, layout: str, moment: str
) -> None:
    expected, (world_size, changes), (phase, count, step) = whole(layout), LAYOUTS[layout], MOMENTS[moment]
    folder = expected["folder"]
    config = str(write_config(folder, moment, **CHANGES, **changes))
    # The last rank alone is told: the others learn of it at the same step.
    stopped = ranks(stopped_run, world_size, config, phase, count, world_size - 1)
    assert [result["code"] for result in stopped] == [143] * world_size
    assert [len(result["losses"]) for result in stopped] == [step] * world_size
    scheduled = [s for s in (4, 6) if s <= step]
    assert stopped[0]["saved"] == [f"global_step{s}" for s in [*scheduled, *([] if step in scheduled else [step])]]
    assert find(folder / moment).step == step
    if phase == "validate":
        assert stopped[0]["evaluated"] == count, "the batch under way is the last one"
    resumed = ranks(stopped_run, world_size, config, "never")
    assert [result["code"] for result in resumed] == [0] * world_size
    assert [[*s["losses"], *r["losses"]] for s, r in zip(stopped, resumed, strict=True)] == expected["losses"]
    tensors = checkpoint_tensors(folder / moment)
    assert tensors.keys() == expected["tensors"].keys()
    assert all(torch.equal(tensors[key], expected["tensors"][key]) for key in tensors)
    # What was measured twice, because it was given up in between or not yet kept, was measured equal.
    assert sorted(set(_log(folder / moment))) == sorted(expected["log"])


def _goes_on(ranks: Ranks, expected: dict[str, Any], name: str, changes: dict[str, Any], step: int) -> None:
    """Started again, the run is the one it would have been."""
    folder = expected["folder"]
    assert find(folder / name).step == step
    resumed = ranks(
        stopped_run, len(expected["losses"]), str(write_config(folder, name, **CHANGES, **changes)), "never"
    )
    assert [result["losses"] for result in resumed] == [losses[step:] for losses in expected["losses"]]
    tensors = checkpoint_tensors(folder / name)
    assert all(torch.equal(tensors[key], expected["tensors"][key]) for key in expected["tensors"])


def test_a_signal_while_a_save_is_in_the_background(whole: Callable[[str], dict[str, Any]], ranks: Ranks) -> None:
    """The one under way ends, and is the only one of its step; that of the step at which the run leaves comes after."""
    changes = {"async_save": True, "keep_last_n_checkpoints": 1}
    config = str(write_config(whole("dp2")["folder"], "background", **CHANGES, **changes))
    stopped = ranks(stopped_run, 2, config, "save", 1, 1)
    step = len(stopped[0]["losses"])
    assert step in (4, 5, 6)
    steps = [f"global_step{step}" for step in sorted({4, step})]
    assert [(result["code"], result["saved"]) for result in stopped] == [(143, steps)] * 2
    _goes_on(ranks, whole("dp2"), "background", changes, step)


def test_a_repeated_sigterm_during_a_save_changes_nothing(whole: Callable[[str], dict[str, Any]], ranks: Ranks) -> None:
    config = str(write_config(whole("dp2")["folder"], "terms", **CHANGES))
    stopped = ranks(stopped_run, 2, config, "save", 1, None, signal.SIGTERM, 3)
    assert [(result["code"], result["saved"]) for result in stopped] == [(143, ["global_step4"])] * 2
    _goes_on(ranks, whole("dp2"), "terms", {}, 4)


def test_a_second_interrupt_breaks_a_save_off(whole: Callable[[str], dict[str, Any]], ranks: Ranks) -> None:
    """The last checkpoint is what it was."""
    changes = {"checkpoint_factor": 2}
    config = str(write_config(whole("one")["folder"], "interrupts", **{**CHANGES, **changes}))
    (stopped,) = ranks(stopped_run, 1, config, "save", 2, None, signal.SIGINT, 2)
    assert (stopped["code"], stopped["saved"]) == (130, ["global_step2"])
    _goes_on(ranks, whole("one"), "interrupts", {}, 2)


def test_a_step_for_which_there_are_several_reasons_to_save_is_saved_once(
    whole: Callable[[str], dict[str, Any]], ranks: Ranks
) -> None:
    """Due by checkpoint_factor, by exit_interval and by the time limit."""
    folder = whole("dp2")["folder"]
    config = str(write_config(folder, "once", **CHANGES, exit_interval=4))
    left = ranks(stopped_run, 2, config, "never")
    assert [(result["code"], result["saved"]) for result in left] == [(0, ["global_step4"])] * 2
    _goes_on(ranks, whole("dp2"), "once", {}, 4)
    for late_after, saved in ((4, ["global_step4"]), (5, ["global_step4", "global_step5"])):
        config = str(write_config(folder, f"late{late_after}", **CHANGES, exit_duration_in_mins=1000))
        late = ranks(stopped_run, 2, config, "never", 1, None, signal.SIGTERM, 1, late_after)
        assert [(result["code"], result["saved"]) for result in late] == [(0, saved)] * 2
        assert len(late[0]["losses"]) == late_after
        _goes_on(ranks, whole("dp2"), f"late{late_after}", {}, late_after)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_every_stop_signal_has_its_code(ranks: Ranks, tmp_path: Path, number: int) -> None:
    stopped = ranks(stopped_run, 2, str(write_config(tmp_path)), "train", 3, None, number)
    assert [(result["code"], result["saved"][-1]) for result in stopped] == [(128 + number, "global_step3")] * 2


@pytest.mark.parametrize("phase", ["start", "index"])
def test_a_run_that_has_not_begun_leaves_at_once_and_leaves_nothing(ranks: Ranks, tmp_path: Path, phase: str) -> None:
    config = str(write_config(tmp_path, num_workers=0))
    stopped = ranks(stopped_run, 2, config, phase, 2 if phase == "index" else 1)
    assert [(result["code"], result["losses"], result["saved"]) for result in stopped] == [(143, [], [])] * 2
    left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".lock") or path.name.startswith(".")]
    assert left == []
    assert not list(tmp_path.glob("run/global_step*"))
    assert ranks(stopped_run, 2, config, "never")[0]["code"] == 0


def test_a_run_that_learnt_nothing_new_saves_nothing_new(ranks: Ranks, tmp_path: Path) -> None:
    """Continued in another folder and stopped in the validation that it makes up for: there is nothing to keep."""
    ranks(stopped_run, 1, str(write_config(tmp_path, **CHANGES)), "validate", 2)
    moved = str(write_config(tmp_path, "moved", load=str(tmp_path / "run"), **CHANGES))
    (stopped,) = ranks(stopped_run, 1, moved, "validate", 1)
    assert (stopped["code"], stopped["saved"], stopped["evaluated"]) == (143, [], 1)


def test_the_time_limit_saves_and_ends_with_0(ranks: Ranks, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, checkpoint_factor=100, exit_duration_in_mins=1e-6))
    first = ranks(stopped_run, 2, config, "never")
    # Over before the first step: the run is not begun, and there is nothing to save.
    assert [(result["code"], result["losses"], result["saved"]) for result in first] == [(0, [], [])] * 2


def _log(folder: Path) -> list[tuple[int, str, float]]:
    """What was learnt and measured, in order, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("train/lm_loss", "train/grad_norm", "train/learning_rate", "validation/lm_loss", "test/lm_loss")
    return [(record["step"], name, record[name]) for record in records for name in kept if name in record]
