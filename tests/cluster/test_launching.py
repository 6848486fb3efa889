"""Runs on two nodes: the same losses as on one, one report of what failed, nothing left running, requeued jobs."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import ROOT, Cluster, processes, wait_for
from tests.integration.run_cases import checkpoint_tensors, train_run, write_config

Ranks = Callable[..., list[Any]]
DEEPY = (sys.executable, str(ROOT / "deepy.py"))
TRAIN = str(ROOT / "train.py")
SECRET = "not-for-anyone-to-see"
ON_CPU = {"device": "cpu"}

# A rank that needs no torch: it says who it is, and waits.
WAITING = """
import json, os, pathlib, socket, sys, time
rank = os.environ["RANK"]
print(f"words of rank {rank}", file=sys.stderr, flush=True)
names = ("WANDB_API_KEY", "FROM_FILE", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
told = {"host": socket.gethostname(), **{name: os.environ.get(name) for name in names}}
pathlib.Path(f"told{rank}.new").write_text(json.dumps(told))
pathlib.Path(f"told{rank}.new").rename(f"told{rank}")
time.sleep(300)
"""


def hostfile(folder: Path, slots: int) -> str:
    path = folder / "hosts"
    path.write_text(f"node1 slots={slots}\nnode2 slots={slots}\n")
    return str(path)


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/lm_loss"] for record in records if "train/lm_loss" in record]


def of_script(folder: Path, name: str) -> dict[int, str]:
    """Processes that run a script of this test, on whichever node."""
    return {pid: line for pid, line in processes(str(folder)).items() if name in line}


@pytest.mark.parametrize(("launcher", "slots"), [("pdsh", 2), ("openmpi", 1), ("slurm", 1)])
def test_two_nodes_train_as_one(cluster: Cluster, ranks: Ranks, tmp_path: Path, launcher: str, slots: int) -> None:
    expected = ranks(train_run, 2 * slots, str(write_config(tmp_path, "one", train_iters=4)))
    is_slurm = launcher == "slurm"
    where = {"num_nodes": 2, "cpu_processes": slots} if is_slurm else {"hostfile": hostfile(tmp_path, slots)}
    config = write_config(tmp_path, "two", train_iters=4, launcher=launcher, **where, **ON_CPU)
    front = ("salloc", "-Q", "-N2", "--exclusive", "-p", "high") if is_slurm else ()
    code, out, err = cluster.run(*front, *DEEPY, TRAIN, str(config), cwd=tmp_path)
    assert code == 0, out + err
    assert losses(tmp_path / "two") == pytest.approx(expected[0]["losses"], rel=0 if slots == 1 else 1e-6)
    assert not (tmp_path / ".deepy").exists()
    assert processes(str(tmp_path)) == {}


def test_srun_of_train_itself(cluster: Cluster, ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks(train_run, 2, str(write_config(tmp_path, "one", train_iters=4)))
    config = write_config(tmp_path, "two", train_iters=4, **ON_CPU)
    command = ("srun", "-N2", "--ntasks-per-node=1", "--input=none", "-p", "high", sys.executable, TRAIN, str(config))
    code, out, err = cluster.run(*command, cwd=tmp_path)
    assert code == 0, out + err
    assert losses(tmp_path / "two") == expected[0]["losses"]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "slurm"])
def test_a_killed_rank_ends_the_run_on_every_node(cluster: Cluster, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    (tmp_path / ".deepspeed_env").write_text("# for the ranks\nFROM_FILE=yes\n")
    where = {"num_nodes": 2, "cpu_processes": 2} if launcher == "slurm" else {"hostfile": hostfile(tmp_path, 2)}
    config = write_config(tmp_path, launcher=launcher, **where, **ON_CPU)
    front = ("salloc", "-Q", "-N2", "--exclusive", "-p", "high") if launcher == "slurm" else ()
    job = cluster.start(*front, *DEEPY, "waiting.py", str(config), cwd=tmp_path, WANDB_API_KEY=SECRET)
    try:
        told = [tmp_path / f"told{rank}" for rank in range(4)]
        wait_for(lambda: all(path.exists() for path in told) or job.poll() is not None, "four ranks")
        assert job.poll() is None, job.communicate()
        heard = [json.loads(path.read_text()) for path in told]
        assert [one["host"] for one in heard] == ["node1", "node1", "node2", "node2"]
        assert [(one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in heard] == [("0", "4"), ("1", "4")] * 2
        names = ("WANDB_API_KEY", "FROM_FILE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
        assert {tuple(one[name] for name in names) for one in heard} == {(SECRET, "yes", "node1", "eth0")}
        assert processes(SECRET) == {}, "a secret on a command line"
        running = of_script(tmp_path, "waiting.py")
        on_node2 = [pid for pid in running if rank_of(pid) == "3"]
        assert len(on_node2) == 1
        killed_at = time.monotonic()
        os.kill(on_node2[0], signal.SIGKILL)
        out, err = job.communicate(timeout=30)
        assert time.monotonic() - killed_at < 15
    finally:
        job.kill()
        job.communicate()
    assert job.returncode == 128 + signal.SIGKILL, out + err
    assert err.rstrip().endswith(
        "rank 3 on node2 was ended by SIGKILL, the first to do so. The system does that where memory runs out. "
        "Its last words:\nwords of rank 3"
    )
    assert SECRET not in out + err
    wait_for(lambda: not processes(str(tmp_path)), "no process is left", 5)
    assert not (tmp_path / ".deepy").exists()


def rank_of(pid: int) -> str | None:
    for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if item.startswith(b"RANK="):
            return item[5:].decode()
    return None


def test_killing_deepy_itself_ends_the_run_on_every_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    config = write_config(tmp_path, launcher="pdsh", hostfile=hostfile(tmp_path, 1), **ON_CPU)
    job = cluster.start(*DEEPY, "waiting.py", str(config), cwd=tmp_path)
    wait_for(lambda: (tmp_path / "told0").exists() and (tmp_path / "told1").exists(), "two ranks")
    job.kill()
    job.communicate()
    wait_for(lambda: not processes(str(tmp_path)), "no process is left", 15)


@pytest.mark.full
def test_a_frozen_launcher_is_killed_by_its_pid(cluster: Cluster, tmp_path: Path) -> None:
    """The run ends, and so does what does not hear of it any more."""
    (tmp_path / "waiting.py").write_text(
        WAITING.replace("time.sleep(300)", "time.sleep(3 if rank == '0' else 300); sys.exit(9)")
    )
    config = write_config(tmp_path, launcher="pdsh", hostfile=hostfile(tmp_path, 1), **ON_CPU)
    job = cluster.start(*DEEPY, "waiting.py", str(config), cwd=tmp_path)
    wait_for(lambda: (tmp_path / "told1").exists(), "the rank on node2")
    [launcher] = [parent_of(pid) for pid in of_script(tmp_path, "waiting.py") if rank_of(pid) == "1"] or [0]
    assert launcher
    os.kill(launcher, signal.SIGSTOP)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 9
    assert "node2: the launcher (process " in err
    wait_for(lambda: not processes(str(tmp_path)), "no process is left", 10)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_preempted_job_is_requeued_and_goes_on_bitwise(cluster: Cluster, ranks: Ranks, tmp_path: Path) -> None:
    long = {"train_iters": 200, "checkpoint_factor": 1000, "eval_interval": 1000}
    expected = ranks(train_run, 2, str(write_config(tmp_path, "whole", **long)), timeout=120)
    config = write_config(tmp_path, "job", **long, **ON_CPU, load=None)
    flags = ("--submit", "--nodes", "2", "--partition", "low", "--time", "10:00")
    code, out, err = cluster.run(*DEEPY, *flags, TRAIN, str(config), cwd=tmp_path)
    assert code == 0, err
    number = next(line.split()[-1] for line in out.splitlines() if line.startswith("submitted"))
    log = Path(next(line.split()[-1] for line in out.splitlines() if line.startswith("log")))
    # What is changed now is not for the job that waits or runs.
    config.write_text("changed: true")
    wait_for(lambda: log.exists() and "iteration  " in log.read_text(), "the first step")
    urgent = ("sbatch", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    assert cluster.run(*urgent, cwd=tmp_path)[0] == 0

    def state() -> str:
        return cluster.run("scontrol", "show", "job", number, cwd=tmp_path)[1]

    wait_for(lambda: "start 2" in log.read_text(), "the requeued job", 90)
    wait_for(lambda: "JobState=COMPLETED" in state() or "JobState=FAILED" in state(), "the job's end", 90)
    text = log.read_text()
    assert "JobState=COMPLETED" in state(), text
    assert "Restarts=1 " in state()
    assert "leaving after step" in text
    assert f"continuing from {tmp_path}/job/global_step" in text
    assert losses(tmp_path / "job") == expected[0]["losses"]
    whole, resumed = checkpoint_tensors(tmp_path / "whole"), checkpoint_tensors(tmp_path / "job")
    assert whole.keys() == resumed.keys()
    assert all(bool((whole[key] == resumed[key]).all()) for key in whole)
    wait_for(lambda: not processes(str(tmp_path)), "no process is left", 5)
