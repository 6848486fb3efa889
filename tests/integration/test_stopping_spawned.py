"""The launcher's part with real processes: a stop reaches all ranks and its code comes back; a failed run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import find
from tests.integration.run_cases import checkpoint_tensors, train_run, write_config

Ranks = Callable[..., list[Any]]
ROOT = Path(__file__).parents[2]
# train.py, but for what happens to rank 1 before the fifth step of the first starts, something else each time.
SCRIPT = """
import os, signal, time
from pathlib import Path
from megatron.common.interpreter import run_command
from megatron.engine.train_engine import TrainEngine
step, steps, done = TrainEngine.train_step, [], Path(__file__).with_suffix(".done")
what = WHAT
def watched(*arguments):
    steps.append(1)
    count = len(done.read_text()) if done.exists() else 0
    if len(steps) == 5 and os.environ["RANK"] == "1" and count < len(what):
        done.write_text("x" * (count + 1))
        exec(what[count])
    return step(*arguments)
TrainEngine.train_step = watched
run_command("megatron.cli.train")
"""
CHANGES = {"cpu_processes": 2, "device": "cpu", "checkpoint_factor": 2, "train_iters": 40, "eval_interval": 100}


def deepy(folder: Path, what: list[str], config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script = folder / f"{config.stem}.py"
    script.write_text(SCRIPT.replace("WHAT", repr(what)))
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in ranks}
    return subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), *flags, str(script), str(config)],
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_killed_rank_a_hanging_one_and_a_stop_of_the_launcher(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train_run, 2, str(write_config(tmp_path, "whole", **CHANGES)))
    expected = checkpoint_tensors(tmp_path / "whole")

    # load is unset: only a restart knows to go on from the run's own checkpoints.
    config = write_config(
        tmp_path, "killed", **CHANGES, load=None, allow_fresh_start=None, watchdog_timeout_s=10
    )  # fmt: skip
    happens = ["os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(600)"]
    done = deepy(tmp_path, happens, config, "--max-restarts", "2")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "restart" in line] == [
        f"restart 1 of 2 after exit code 137: from {tmp_path}/killed/global_step4, in 1 s",
        f"restart 2 of 2 after exit code 7: from {tmp_path}/killed/global_step8, in 1 s",
    ]
    assert f"continuing from {tmp_path}/killed/global_step4" in done.stdout
    assert _equal(checkpoint_tensors(tmp_path / "killed"), expected)

    config = write_config(tmp_path, "stopped", **{**CHANGES, "checkpoint_factor": 1000})
    done = deepy(tmp_path, ["os.kill(os.getppid(), signal.SIGTERM)"], config, "--max-restarts", "2")
    assert done.returncode == 143, done.stderr
    step = find(tmp_path / "stopped").step
    assert 5 <= step < 40
    assert f"leaving after step {step} of 40 (SIGTERM)" in done.stdout
    assert done.stdout.count("saved ") == 1
    assert "restart" not in done.stderr
    resumed = ranks(train_run, 2, str(config))
    assert resumed[0]["start"] == step
    assert _equal(checkpoint_tensors(tmp_path / "stopped"), expected)


def _equal(left: dict[Any, torch.Tensor], right: dict[Any, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
