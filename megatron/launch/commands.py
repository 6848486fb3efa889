"""The command and the environment of every rank on this host. Starts nothing.

Invariant: ranks 0 to world_size - 1 each appear once, and only RANK and LOCAL_RANK differ between them.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron.common.devices import count_cores, count_gpus
from megatron.common.errors import LaunchError
from megatron.common.rank import RankEnv, free_port
from megatron.config import Config


@dataclass(frozen=True)
class RankCommand:
    """How one rank is started. added: environment variables beyond this process's own."""

    rank: int
    arguments: list[str]
    added: dict[str, str] = field(default_factory=dict)

    def shell_line(self) -> str:
        """The same as one line for a shell."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.added.items())
        return f"{variables} {shlex.join(self.arguments)}"


def rank_commands(
    config: Config, script: str, config_file: str | Path, environment: Mapping[str, str] | None = None
) -> list[RankCommand]:
    """One command for each rank of a run on this host.

    Raises: LaunchError if the run needs other hosts, or more GPUs than this one has.
    """
    environment = os.environ if environment is None else environment
    world_size = config.parallel.world_size
    require_one_host(config)
    if config.launcher.device == "cuda":
        gpus = count_gpus(environment)
        if world_size > gpus:
            raise LaunchError(
                f"the run needs {world_size} GPUs ({config.origin('world_size')}) and this host offers {gpus}. Use "
                "fewer "
                "processes, or start the script under srun, mpirun or torchrun on several hosts."
            )
    address = config.launcher.master_addr or environment.get("MASTER_ADDR") or "127.0.0.1"
    port = config.launcher.master_port or int(environment.get("MASTER_PORT") or 0) or free_port()
    shared = (
        {"OMP_NUM_THREADS": str(max(1, count_cores() // world_size))} if "OMP_NUM_THREADS" not in environment else {}
    )
    if config.launcher.device == "cpu":
        shared["DS_ACCELERATOR"] = "cpu"
    arguments = [sys.executable, "-u", script, "--config", str(config_file)]
    return [
        RankCommand(
            rank,
            arguments,
            {**RankEnv(rank, rank, world_size, world_size, address, port, "torchrun").variables(), **shared},
        )
        for rank in range(world_size)
    ]


def require_one_host(config: Config) -> None:
    """Raises: LaunchError if the configuration asks for more than this host."""
    launcher = config.launcher
    if launcher.hostfile is not None or launcher.num_nodes > 1:
        key, value = (
            ("hostfile", launcher.hostfile) if launcher.hostfile is not None else ("num_nodes", launcher.num_nodes)
        )
        raise LaunchError(
            f"{config.origin(key)}: {key} = {value}: starting processes on other hosts is not supported yet. Run the "
            "script "
            f"itself on every host under srun, mpirun or torchrun (srun python train.py my.yml), or remove {key} to "
            "use this host."
        )
