"""The command and the environment of every rank on this host, and whether the run needs others. Starts nothing.

Invariant: ranks 0 to world_size - 1 each appear once, and only RANK and LOCAL_RANK differ between them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.devices import count_cores, count_gpus
from megatron.common.errors import LaunchError
from megatron.common.rank import RankEnv, free_port
from megatron.config import Config
from megatron.config.hosts import HostfileError, read_slots
from megatron.config.layout import allocated_nodes
from megatron.launch.environment import read_env_file, shown


@dataclass(frozen=True)
class RankCommand:
    """How one rank is started. added: variables beyond the launcher's own. node: on which host of the run."""

    rank: int
    arguments: list[str]
    added: dict[str, str] = field(default_factory=dict)
    node: int = 0

    def values(self) -> dict[str, Any]:
        """The same for scripts, without what may be secret."""
        variables = {name: shown(name, value) for name, value in self.added.items()}
        return {"rank": self.rank, "node": self.node, "command": self.arguments, "environment": variables}

    def shell_line(self) -> str:
        """The same as one line for a shell, without what may be secret."""
        variables = " ".join(f"{name}={shlex.quote(shown(name, value))}" for name, value in self.added.items())
        return f"{variables} {shlex.join(self.arguments)}"


def rank_commands(
    config: Config, script: str, config_file: str | Path, environment: Mapping[str, str] | None = None
) -> list[RankCommand]:
    """One command for each rank of a run on this host.

    Raises: LaunchError if the run needs more GPUs than this host has, or other hosts that it does not name.
    """
    environment = os.environ if environment is None else environment
    world_size = config.parallel.world_size
    _require_hosts(config)
    if config.launcher.device == "cuda":
        gpus = count_gpus(environment)
        if world_size > gpus:
            raise LaunchError(
                f"the run needs {world_size} GPUs ({config.origin('world_size')}) and this host offers {gpus}. Use "
                "fewer processes, or name several hosts in a hostfile."
            )
    address = config.launcher.master_addr or environment.get("MASTER_ADDR") or "127.0.0.1"
    port = config.launcher.master_port or int(environment.get("MASTER_PORT") or 0) or free_port()
    shared = read_env_file(environment)
    if "OMP_NUM_THREADS" not in {**environment, **shared}:
        shared["OMP_NUM_THREADS"] = str(max(1, count_cores() // world_size))
    if config.launcher.device == "cpu":
        shared["DS_ACCELERATOR"] = "cpu"
    elif chosen := _chosen_devices(config):
        shared["CUDA_VISIBLE_DEVICES"] = chosen
    arguments = [sys.executable, "-u", script, "--config", str(config_file)]
    commands = []
    for rank in range(world_size):
        own = RankEnv(rank, rank, world_size, world_size, address, port, "torchrun").variables()
        # Whatever the file sets, the rank stays what it is.
        commands.append(RankCommand(rank, arguments, {**own, **shared, **own}))
    return commands


def needs_other_hosts(config: Config, environment: Mapping[str, str]) -> bool:
    """Whether the run goes through a launcher: to the hosts of an allocation, or to others than this one.

    Raises: LaunchError for launcher = slurm outside an allocation.
    """
    launcher = config.launcher
    if launcher.launcher == "slurm":
        if not allocated_nodes(environment):
            raise LaunchError(
                f"{config.origin('launcher')}: launcher = slurm, and this is no Slurm allocation. Use ./deepy.py "
                "--submit train.py my.yml for a batch job, salloc for an allocation, or --set launcher=pdsh for this "
                "host alone."
            )
        return True
    if launcher.hostfile is None:
        if launcher.force_multi and launcher.num_nodes < 2:
            raise LaunchError(f"{config.origin('force_multi')}: force_multi = true needs a hostfile. Set hostfile.")
        return False
    hosts = list(_slots(config))
    return len(hosts) > 1 or launcher.force_multi or not is_this_host(hosts[0])


def is_this_host(name: str) -> bool:
    """Whether a name or an address of a hostfile means the host that this process runs on."""
    own = socket.gethostname()
    if name in ("localhost", "127.0.0.1", "::1", own, own.split(".")[0]):
        return True
    with contextlib.suppress(OSError):
        found = {info[4][0] for info in socket.getaddrinfo(name, None)}
        return bool(found & {info[4][0] for info in socket.getaddrinfo(own, None)})
    return False


def _slots(config: Config) -> dict[str, list[int]]:
    launcher = config.launcher
    assert launcher.hostfile is not None
    try:
        return read_slots(launcher.hostfile, launcher.include, launcher.exclude, launcher.num_nodes)
    except HostfileError as error:
        raise LaunchError(f"{config.origin('hostfile')}: {error}") from error


def _chosen_devices(config: Config) -> str | None:
    """The GPUs that include or exclude choose on this host, if either does."""
    if config.launcher.hostfile is None or not (config.launcher.include or config.launcher.exclude):
        return None
    return ",".join(map(str, next(iter(_slots(config).values()))))


def _require_hosts(config: Config) -> None:
    """Raises: LaunchError if the configuration asks for more hosts than it names."""
    launcher = config.launcher
    if launcher.hostfile is None and launcher.num_nodes > 1:
        raise LaunchError(
            f"{config.origin('num_nodes')}: num_nodes = {launcher.num_nodes}, and no key names the hosts. Set hostfile "
            "to a file with a line `host slots=N` for each; in a Slurm allocation set launcher: slurm; or run the "
            "script itself on every host under srun, mpirun or torchrun (srun python train.py my.yml)."
        )
