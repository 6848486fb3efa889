"""What the launchers of a run's hosts are told: one file in a folder that all hosts see.

The file may hold secrets (environment variables) and the token of the job; only its owner can read it. Invariant:
`Job.read` after `write` gives an equal job, on every host.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.common.devices import count_gpus
from megatron.common.errors import LaunchError
from megatron.config import Config
from megatron.config.hosts import HostfileError, read_slots
from megatron.launch.commands import RankCommand
from megatron.launch.stopping import EXIT_GRACE_MINS
from megatron.launch.wire import candidate_ports

JOB_FILE, CONFIG_FILE, OUTCOME_FILE = "job.json", "config.json", "exit_code"
# Hosts, and the process ids of their launchers, that did not let go at the end.
STUCK_FILE = "stuck"
FOLDER = ".deepy"


@dataclass(frozen=True)
class Host:
    """One host of a run. slots: the numbers of its devices, one process each."""

    name: str
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """A run on several hosts.

    folder: where this file and the resolved configuration are. hosts: in the order of their ranks; under Slurm their
    names are empty, since the allocation tells. master_addr: where rank 0 runs; empty under Slurm, likewise.
    ports: where the first host's launcher may listen for the others; token: what they show each other.
    environment: variables that the launcher of each host sets. is_batch: whether a batch script starts it, which may
    do so again.
    exit_grace_mins: how long processes that were asked to stop may take to leave.
    names_devices: whether processes are limited to the slots' devices; else those of the host are counted from 0.
    """

    launcher: str
    script: str
    folder: str
    directory: str
    hosts: tuple[Host, ...]
    device: str
    master_addr: str = ""
    master_port: int | None = None
    names_devices: bool = False
    ports: tuple[int, ...] = ()
    token: str = ""
    is_batch: bool = False
    exit_grace_mins: float = EXIT_GRACE_MINS
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return sum(len(host.slots) for host in self.hosts)

    def commands(
        self, port: int | str, address: str | None = None, config_file: str = CONFIG_FILE
    ) -> list[RankCommand]:
        """Every rank's command. port: of the rendezvous on the first host."""
        arguments = [sys.executable, "-u", self.script, "--config", str(Path(self.folder) / config_file)]
        shared = {"WORLD_SIZE": str(self.world_size), "MASTER_ADDR": address or self.master_addr}
        shared["MASTER_PORT"] = str(port)
        if self.device == "cpu":
            shared["DS_ACCELERATOR"] = "cpu"
        commands: list[RankCommand] = []
        for node, host in enumerate(self.hosts):
            own = {"LOCAL_WORLD_SIZE": str(len(host.slots))}
            if self.names_devices and self.device == "cuda":
                own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slots))
            for local_rank in range(len(host.slots)):
                rank = {"RANK": str(len(commands)), "LOCAL_RANK": str(local_rank)}
                commands.append(RankCommand(len(commands), arguments, {**rank, **shared, **own}, node))
        return commands

    def write(self) -> Path:
        """Write the file, readable by its owner only. Returns its path."""
        path = Path(self.folder) / JOB_FILE
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Job:
        """Raises: LaunchError if this host does not see the file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LaunchError(
                f"host {socket.gethostname()} cannot read {path} ({error}). The launcher writes it into the folder "
                "where deepy.py was started, and every host must see that folder under the same path: start from a "
                "shared file system."
            ) from error
        hosts = tuple(Host(host["name"], tuple(host["slots"])) for host in values.pop("hosts"))
        return cls(**{**values, "hosts": hosts, "ports": tuple(values["ports"])})


def make_folder() -> Path:
    """A new folder for a job below the current one, which all hosts share. Raises: LaunchError if it cannot be made."""
    parent = Path.cwd() / FOLDER
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
    try:
        parent.mkdir(exist_ok=True)
        (parent / name).mkdir(mode=0o700)
    except OSError as error:
        raise LaunchError(
            f"{parent}: cannot make a folder here ({error.strerror}), which the hosts of a run read the configuration "
            "from. Start deepy.py in a folder that you may write to and that all hosts share."
        ) from error
    return parent / name


def remove_folder(folder: Path) -> None:
    """Remove a job's folder, and the parent with the last one. Nothing may be left of what is secret."""
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
    for path in (folder, folder.parent):
        try:
            path.rmdir()
        except OSError:
            return


def plan_job(config: Config, script: str, folder: str | Path, environment: Mapping[str, str]) -> Job:
    """The job that a configuration asks for. Writes nothing and contacts no host.

    Raises: LaunchError if the hosts' processes are not those that the configuration was resolved for.
    """
    launcher = config.launcher
    hosts = _allocated(config, environment) if launcher.launcher == "slurm" else _listed(config)
    job = Job(
        launcher=launcher.launcher,
        script=script,
        folder=str(folder),
        directory=str(Path.cwd()),
        hosts=hosts,
        device=launcher.device,
        master_addr=_master(config, hosts, environment),
        master_port=launcher.master_port or int(environment.get("MASTER_PORT") or 0) or None,
        names_devices=launcher.launcher != "slurm"
        and (launcher.include or launcher.exclude or launcher.num_gpus) is not None,
        ports=candidate_ports(),
        token=secrets.token_hex(16),
        exit_grace_mins=launcher.exit_grace_in_mins,
    )
    if job.world_size != config.parallel.world_size:
        raise LaunchError(
            f"the configuration is for {config.parallel.world_size} processes ({config.origin('world_size')}) and the "
            f"hosts offer {job.world_size} ({_counts(hosts)}). Make them equal: global_num_gpus, num_gpus and "
            "num_nodes, or the slots of the hostfile."
        )
    return job


def _counts(hosts: tuple[Host, ...]) -> str:
    return ", ".join(f"{host.name or f'node {number}'}: {len(host.slots)}" for number, host in enumerate(hosts))


def _listed(config: Config) -> tuple[Host, ...]:
    launcher = config.launcher
    assert launcher.hostfile is not None
    try:
        slots = read_slots(launcher.hostfile, launcher.include, launcher.exclude, launcher.num_nodes)
    except HostfileError as error:
        raise LaunchError(f"{config.origin('hostfile')}: {error}") from error
    per_host = launcher.num_gpus
    if per_host is None or launcher.include or launcher.exclude:
        return tuple(Host(name, tuple(numbers)) for name, numbers in slots.items())
    return tuple(Host(name, tuple(range(per_host))) for name in slots)


def _allocated(config: Config, environment: Mapping[str, str]) -> tuple[Host, ...]:
    """As many hosts as the run has, with equal shares of its processes."""
    nodes = config.launcher.num_nodes
    if nodes < 1:
        nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    per_host, left = divmod(config.parallel.world_size, nodes)
    if left:
        raise LaunchError(
            f"{config.parallel.world_size} processes ({config.origin('world_size')}) do not divide into {nodes} nodes "
            "of the allocation. Set num_nodes and num_gpus (cpu_processes where there is no GPU)."
        )
    return tuple(Host("", tuple(range(per_host))) for _ in range(nodes))


def _master(config: Config, hosts: tuple[Host, ...], environment: Mapping[str, str]) -> str:
    given = config.launcher.master_addr or environment.get("MASTER_ADDR")
    if given:
        return given
    return hosts[0].name


def require_resolvable(address: str, origin: str) -> None:
    """Raises: LaunchError if this host cannot turn a name into an address."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise LaunchError(
            f"{origin}: the address of rank 0, {address}, cannot be resolved on {socket.gethostname()} ({error}). Set "
            "master_addr to a name or an IP address of the first host that all hosts know."
        ) from error


def gpus_here() -> int:
    """Devices that this host offers to a job."""
    return count_gpus(os.environ)
