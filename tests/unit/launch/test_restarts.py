"""Which failures a run is started again after, from where, and when it is given up."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import save
from megatron.common.errors import CheckpointError, ConfigError
from megatron.config import Config, load
from megatron.launch.restarts import (
    DELAYS_S,
    newest_checkpoint,
    refuse_restarts,
    require_restartable,
    run_with_restarts,
)
from tests.unit.launch.test_commands import TINY


class Attempts:
    """A run whose attempts publish checkpoints of given steps and then end with given codes."""

    def __init__(self, folder: Path, script: Sequence[tuple[list[int], int]], **changes: Any) -> None:
        self.script = list(script)
        self.folder = folder
        self.config = load([], {**TINY, "save": str(folder), "checkpoint_factor": 1, **changes})
        self.configs: list[Config] = []
        self.lines: list[str] = []
        self.delays: list[float] = []

    def __call__(self, config: Config) -> int:
        self.configs.append(config)
        steps, code = self.script.pop(0)
        for step in steps:
            publish(self.folder, step)
        return code

    def run(self, max_restarts: int) -> int:
        return run_with_restarts(self, self.config, max_restarts, wait=self.delays.append, say=self.lines.append)


def publish(folder: Path, step: int) -> None:
    manifest = folder / f"global_step{step}" / "manifest.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("{}")


@pytest.fixture
def attempts(tmp_path: Path) -> Callable[..., Attempts]:
    return lambda *script, **changes: Attempts(tmp_path / "run", script, **changes)


def test_what_the_launcher_takes_for_the_newest_checkpoint_is_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (3, 12, 5):
        save(tmp_path, step, [], {}, rank_tensors={"x": torch.zeros(2)})
    (tmp_path / "global_step99").mkdir()  # not published
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.folder, found.step) == (str(tmp_path / "global_step5"), 5)
    assert newest_checkpoint(f"file://{tmp_path}") == found


def test_checkpoints_in_object_storage_are_gone_on_from() -> None:
    """Taken for a run that has not saved, because no folder of this machine holds any, it would begin again at 0."""
    address = f"memory://{uuid.uuid4().hex}/run"
    config, lines = load([], {**TINY, "save": address, "checkpoint_factor": 1}), list[str]()
    loads: list[str | None] = []

    def attempt(current: Config) -> int:
        loads.append(current.checkpoint.load)
        if len(loads) == 1:
            for step in (9, 7):
                save(address, step, [], {}, rank_tensors={"x": torch.zeros(2)})
        return 137 if len(loads) == 1 else 0

    assert newest_checkpoint(address) is None
    assert run_with_restarts(attempt, config, 3, wait=lambda _: None, say=lines.append) == 0
    assert loads == [None, address]
    assert lines == [f"restart 1 of 3 after exit code 137: from {address}/global_step7, in 1 s"]
    with pytest.raises(CheckpointError, match="cannot be looked at for checkpoints"):
        newest_checkpoint("nothing://bucket")


def test_goes_on_from_the_newest_checkpoint_although_load_was_unset(attempts: Callable[..., Attempts]) -> None:
    run = attempts(([10, 20], 137), ([30], 1), ([], 0), load=None)
    assert run.run(5) == 0
    assert [config.checkpoint.load for config in run.configs] == [None, str(run.folder), str(run.folder)]
    assert run.lines == [
        f"restart 1 of 5 after exit code 137: from {run.folder}/global_step20, in 1 s",
        f"restart 2 of 5 after exit code 1: from {run.folder}/global_step30, in 1 s",
    ]


def test_goes_on_with_everything_however_the_run_began(attempts: Callable[..., Attempts]) -> None:
    began = {"load": "base", "iteration": 7, "finetune": True, "no_load_optim": True, "no_load_rng": True}
    run = attempts(([10], 139), ([], 0), **began)
    assert run.run(1) == 0
    first, second = (config.checkpoint for config in run.configs)
    assert [getattr(first, key) for key in began] == list(began.values())
    assert [getattr(second, key) for key in began] == [str(run.folder), None, False, False, False]
    run = attempts(([10], 139), ([], 0), no_save_rng=True)
    run.run(1)
    assert run.configs[1].checkpoint.no_load_rng, "it saved no random states to load"


def test_checkpoints_of_another_run_are_not_gone_on_from(attempts: Callable[..., Attempts]) -> None:
    run = attempts(([], 137), ([], 0), load=None)
    publish(run.folder, 500)
    assert run.run(1) == 0
    assert run.configs[1] is run.configs[0]
    assert run.lines == ["restart 1 of 1 after exit code 137: as it began, for it has not saved yet, in 10 s"]


@pytest.mark.parametrize("code", [0, 130, 138, 143, 2, 3, 4, 6])
def test_what_is_done_asked_for_or_lasting_is_not_started_again(attempts: Callable[..., Attempts], code: int) -> None:
    run = attempts(([10], code))
    assert run.run(3) == code
    assert len(run.lines) == (1 if 0 < code < 130 else 0)


@pytest.mark.parametrize("code", [1, 7, 8, 134, 137, 139])
def test_crashes_hangs_and_differing_copies_are(attempts: Callable[..., Attempts], code: int) -> None:
    run = attempts(([], code), ([], 0))
    assert run.run(1) == 0


def test_a_failure_to_save_is_if_an_earlier_one_succeeded(attempts: Callable[..., Attempts]) -> None:
    run = attempts(([10], 5), ([], 5))
    assert run.run(9) == 5
    assert run.lines[1] == (
        "not restarted after exit code 5: no checkpoint could be loaded or written, and that needs a person"
    )


def test_a_run_that_gets_no_further_is_given_up_after_longer_and_longer_waits(
    attempts: Callable[..., Attempts],
) -> None:
    # The second attempt gets further; saving an old step anew does not count.
    run = attempts(([10], 1), ([20], 1), ([10], 1), ([], 1), ([], 1))
    assert run.run(50) == 1
    assert run.delays == [DELAYS_S[0], DELAYS_S[0], DELAYS_S[1], DELAYS_S[2]]
    assert run.lines[-1] == (
        "not restarted after exit code 1: 3 failures in a row without getting further between them"
    )


def test_restarts_are_counted(attempts: Callable[..., Attempts]) -> None:
    run = attempts(([10], 1), ([20], 1), ([30], 1))
    assert run.run(2) == 1
    assert run.lines[-1] == "not restarted after exit code 1: --max-restarts 2 are used up"


def test_restarts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="save is not set"):
        require_restartable(load([], TINY), "train.py", is_inference=False)
    with pytest.raises(ConfigError, match=r"generate.py writes no checkpoints"):
        require_restartable(load([], TINY), "generate.py", is_inference=True)
    with pytest.raises(ConfigError, match="here torchrun starts the processes"):
        refuse_restarts(1, "torchrun")
    refuse_restarts(0, "torchrun")
