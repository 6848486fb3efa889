"""From hostfile or allocation to every rank's host, device and environment; and the lines that start launchers."""

from __future__ import annotations

import dataclasses
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import save
from megatron.common.errors import ConfigError, LaunchError
from megatron.config import Config, load
from megatron.launch import commands as commands_module
from megatron.launch.commands import needs_other_hosts, rank_commands
from megatron.launch.job import Job, make_folder, plan_job, remove_folder, require_resolvable
from megatron.launch.restarts import newest_checkpoint, requeued, require_progress
from megatron.launch.starters import starter
from megatron.launch.submit import Request, batch_script, submit

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 16,
    "tokenizer_type": "CharLevelTokenizer",
    "device": "cpu",
}
HOSTS = "n1 slots=2  # first\n\nn2 slots=3\n10.0.0.3 slots=1\n"


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return str(path)


def config(**changes: Any) -> Config:
    return load([], {**TINY, **changes})


def job_of(**changes: Any) -> Job:
    return plan_job(config(**changes), "train.py", "/jobs/1", {})


def places(job: Job) -> list[tuple[str, str, str, str]]:
    return [
        (job.hosts[one.node].name, *(one.added[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
        for one in job.commands(29500)
    ]


def test_ranks_follow_the_hostfile(hosts: str) -> None:
    job = job_of(hostfile=hosts)
    assert places(job) == [
        ("n1", "0", "0", "2"),
        ("n1", "1", "1", "2"),
        ("n2", "2", "0", "3"),
        ("n2", "3", "1", "3"),
        ("n2", "4", "2", "3"),
        ("10.0.0.3", "5", "0", "1"),
    ]
    command = job.commands(29500)[3]
    assert command.arguments[1:] == ["-u", "train.py", "--config", "/jobs/1/config.json"]
    assert {name: command.added[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")} == {
        "WORLD_SIZE": "6",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500",
        "DS_ACCELERATOR": "cpu",
    }


def test_the_time_to_leave_comes_from_the_configuration(tmp_path: Path, hosts: str) -> None:
    job = plan_job(config(hostfile=hosts, exit_grace_in_mins=2.5), "train.py", tmp_path, {})
    assert Job.read(job.write()).exit_grace_mins == 2.5


def test_filters_choose_devices(hosts: str) -> None:
    job = dataclasses.replace(job_of(hostfile=hosts, include="n2:0,2@n1:1"), device="cuda")
    assert [(job.hosts[c.node].name, c.added["CUDA_VISIBLE_DEVICES"]) for c in job.commands(1)] == [
        ("n1", "1"),
        ("n2", "0,2"),
        ("n2", "0,2"),
    ]
    job = dataclasses.replace(job_of(hostfile=hosts, num_nodes=2, num_gpus=1), device="cuda")
    assert [(job.hosts[c.node].name, c.added["CUDA_VISIBLE_DEVICES"]) for c in job.commands(1)] == [
        ("n1", "0"),
        ("n2", "0"),
    ]


def test_an_allocation_gets_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    allocated = config(launcher="slurm", num_nodes=2, cpu_processes=2)
    job = plan_job(allocated, "train.py", "/jobs/1", {"SLURM_JOB_NUM_NODES": "3"})
    assert [len(host.slots) for host in job.hosts] == [2, 2]
    assert job.master_addr == ""
    with pytest.raises(LaunchError, match=r"5 processes .* do not divide into 3 nodes"):
        plan_job(config(launcher="slurm", global_num_gpus=5), "train.py", "/jobs/1", {"SLURM_JOB_NUM_NODES": "3"})


def test_another_number_of_processes_than_the_hosts_offer_is_refused(hosts: str) -> None:
    with pytest.raises(LaunchError, match=r"for 4 processes .*hosts offer 6 \(n1: 2, n2: 3, 10.0.0.3: 1\)"):
        job_of(hostfile=hosts, global_num_gpus=4)


def test_the_file_is_for_its_owner_only_and_read_back(hosts: str, tmp_path: Path) -> None:
    job = dataclasses.replace(job_of(hostfile=hosts), folder=str(tmp_path), environment={"WANDB_API_KEY": "k"})
    path = job.write()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Job.read(path) == job
    with pytest.raises(LaunchError, match=r"cannot read .*absent.*every host must see that folder"):
        Job.read(tmp_path / "absent")


def test_a_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder()
    (folder / "job.json").write_text("{}")
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_does_not_resolve_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"^here: the address of rank 0, no-such-host.invalid, cannot be resolved"):
        require_resolvable("no-such-host.invalid", "here")
    require_resolvable("127.0.0.1", "here")


def line(job: Job, which: Any = lambda name: name, **changes: Any) -> str:
    found = starter(config(**changes), job, which)
    return found.shell_line()


def test_lines_that_start_launchers(hosts: str) -> None:
    common = {"hostfile": hosts, "num_nodes": 2}
    text = line(job_of(**common), **common, ssh_port=2222, launcher_args="-t 5")
    assert text.startswith("PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND='-p 2222' pdsh -S -N -f 32 -w n1,n2 -t 5 'cd ")
    assert text.endswith("deepy.py --node /jobs/1/job.json %n'")
    text = line(job_of(**common, launcher="openmpi"), **common, launcher="openmpi")
    assert text.startswith("mpirun.openmpi -np 2 --host n1:1,n2:1 --map-by ppr:1:node --bind-to none ")
    for launcher in ("mpich", "mvapich", "impi"):
        text = line(job_of(**common, launcher=launcher), **common, launcher=launcher)
        assert text.startswith("mpiexec.hydra -n 2 -ppn 1 -hosts n1,n2 ")
    slurm = {"launcher": "slurm", "num_nodes": 2, "cpu_processes": 2, "account": "a", "comment": "b c"}
    text = line(job_of(**slurm), **slurm)
    assert text.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ")
    assert "--account=a '--comment=b c' " in text


def test_a_missing_program_is_named(hosts: str) -> None:
    with pytest.raises(LaunchError, match=r"launcher = mpich needs mpiexec.hydra or mpirun.mpich or mpirun .*apt-get"):
        line(job_of(hostfile=hosts, launcher="mpich"), lambda name: None, hostfile=hosts, launcher="mpich")


def test_who_needs_a_launcher(hosts: str, tmp_path: Path) -> None:
    assert needs_other_hosts(config(hostfile=hosts), {})
    assert not needs_other_hosts(config(), {})
    here = tmp_path / "here"
    here.write_text("localhost slots=2\n")
    assert not needs_other_hosts(config(hostfile=str(here)), {})
    assert needs_other_hosts(config(hostfile=str(here), force_multi=True), {})
    assert needs_other_hosts(config(launcher="slurm"), {"SLURM_JOB_NUM_NODES": "1"})
    with pytest.raises(LaunchError, match=r"launcher = slurm, and this is no Slurm allocation.*--submit"):
        needs_other_hosts(config(launcher="slurm"), {})
    with pytest.raises(LaunchError, match="force_multi = true needs a hostfile"):
        needs_other_hosts(config(force_multi=True), {})


def test_filters_choose_devices_of_this_host_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").write_text("localhost slots=4\n")
    monkeypatch.setattr(commands_module, "count_gpus", lambda environment: 4)
    chosen = config(hostfile=str(tmp_path / "here"), include="localhost:1,3").replace(device="cuda")
    commands = rank_commands(chosen, "t.py", "c", {})
    assert [command.added["CUDA_VISIBLE_DEVICES"] for command in commands] == ["1,3", "1,3"]


BATCH = {"launcher": "slurm", "num_nodes": 2, "cpu_processes": 2}


def script_of(request: Request, **changes: Any) -> str:
    asked = {**BATCH, "save": "/ckpt/run", "checkpoint_factor": 5, **changes}
    return batch_script(config(**asked), request, job_of(**asked), "my", Path("/logs"), ["./deepy.py", "--submit"])


def test_batch_script(tmp_path: Path) -> None:
    text = script_of(Request(nodes=2, time="1-00:00:00", partition="gpu", comment="two words"), account="me")
    options = [shlex.split(text)[0] for text in text.splitlines() if text.startswith("#SBATCH")]
    options = [text.removeprefix("#SBATCH ") for text in text.splitlines() if text.startswith("#SBATCH")]
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=me",
        "--comment='two words'",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
        "--exclusive",
        "--output=/logs/my-%j.log",
    } <= set(options)
    assert sum(one.startswith("srun ") for one in text.splitlines()) == 1
    assert "scontrol requeue" in text
    (tmp_path / "s").write_text(text)
    assert subprocess.run(["bash", "-n", str(tmp_path / "s")], timeout=20, check=False).returncode == 0


def test_a_job_without_checkpoints_is_not_requeued() -> None:
    text = script_of(Request(nodes=2, cpus_per_node=8), save=None, checkpoint_factor=None)
    assert "#SBATCH --no-requeue" in text
    assert "scontrol" not in text
    assert "#SBATCH --cpus-per-task=8" in text
    assert "--exclusive" not in text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(nodes=3), "--nodes 3, and num_nodes = 2"),
        (Request(nodes=2, gpus_per_node=8), "--gpus-per-node 8 on 2 nodes, and the run has 4 processes"),
        (Request(nodes=2, time="soon"), "--time soon: write minutes"),
        (Request(nodes=2, comment="a\nb"), "is one line"),
    ],
)
def test_requests_that_contradict(request_: Request, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        submit(config(**BATCH), "train.py", request_, ["./deepy.py"], dry_run=True)


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_a_requeued_job_goes_on_from_its_own_checkpoints_only(tmp_path: Path, scheme: str) -> None:
    place = f"{scheme}{tmp_path / 'save'}"
    asked = config(save=place, checkpoint_factor=5, load="/other/run", finetune=True, iteration=7)
    assert requeued(asked, 0.0) == asked
    save(place, 5, [], {}, rank_tensors={"x": torch.zeros(2)})
    newest = newest_checkpoint(place)
    assert newest is not None
    # One that was there when the job was submitted is another run's.
    assert requeued(asked, newest.written_s + 1) == asked
    after = requeued(asked, newest.written_s - 1).checkpoint
    assert (after.load, after.finetune, after.iteration, after.allow_fresh_start) == (place, False, None, False)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_job_that_never_gets_on_is_given_up(tmp_path: Path, scheme: str) -> None:
    place = f"{scheme}{tmp_path / 'save'}"
    asked = config(save=place, checkpoint_factor=5)
    record = tmp_path / "starts"
    for _ in range(2):
        require_progress(asked, record)
    save(place, 5, [], {}, rank_tensors={"x": torch.zeros(2)})
    for _ in range(3):
        require_progress(asked, record)
    with pytest.raises(LaunchError, match=r"started 4 times in a row from the same place, .*global_step5"):
        require_progress(asked, record)
