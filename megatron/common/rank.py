"""Which rank of which run this process is, whoever started it: our launcher, torchrun, srun, mpirun, or nobody.

Opens no connection. Invariant: after `detect_rank`, RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set
and agree on all ranks of the run.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron.common.errors import LaunchError

# Below the range from which systems hand out ports by themselves.
_FIRST_PORT, _NUM_PORTS = 20000, 12000


@dataclass(frozen=True)
class RankEnv:
    """A process's place in the run. starter: "torchrun" (or our launcher), "srun", "mpirun" or "alone"."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    starter: str

    def variables(self) -> dict[str, str]:
        """The environment variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def detect_rank(environment: MutableMapping[str, str] | None = None) -> RankEnv:
    """Recognise this process's rank and set the environment variables that say so.

    Raises: LaunchError if the environment says it only in part, or contradicts itself.
    """
    environment = os.environ if environment is None else environment
    found = starter_of(environment)
    rank_env = {"torchrun": _from_torchrun, "srun": _from_slurm, "mpirun": _from_mpi, "alone": _alone}[found](
        environment
    )
    if not 0 <= rank_env.rank < rank_env.world_size:
        raise LaunchError(f"rank {rank_env.rank} does not lie in a run of {rank_env.world_size} processes ({found}).")
    environment.update(rank_env.variables())
    return rank_env


def starter_of(environment: Mapping[str, str]) -> str:
    """Who started this process: "torchrun", "srun", "mpirun" or "alone"."""
    if "RANK" in environment or "LOCAL_RANK" in environment:
        return "torchrun"
    if "OMPI_COMM_WORLD_RANK" in environment or "PMI_RANK" in environment:
        return "mpirun"
    # A batch script outside srun has SLURM_PROCID=0 too, but no step.
    if "SLURM_PROCID" in environment and ("SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment):
        return "srun"
    return "alone"


def free_port() -> int:
    """A port on this host that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _from_torchrun(environment: Mapping[str, str]) -> RankEnv:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise LaunchError(
            f"the environment sets {', '.join(n for n in names if n not in missing)} but not {', '.join(missing)}. "
            "Set all five, or none to run as one process."
        )
    world_size = _number(environment, "WORLD_SIZE")
    return RankEnv(
        _number(environment, "RANK"),
        _number(environment, "LOCAL_RANK"),
        world_size,
        _number(environment, "LOCAL_WORLD_SIZE", world_size),
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT"),
        "torchrun",
    )


def _from_slurm(environment: Mapping[str, str]) -> RankEnv:
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if tasks is None:
        world_size = _number(environment, "SLURM_NNODES") * _number(environment, "SLURM_NTASKS_PER_NODE")
    else:
        world_size = int(tasks)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if nodes == 1 else first_host(node_list))
    if not address:
        raise LaunchError(
            "srun runs several nodes and SLURM_JOB_NODELIST is not set. Set MASTER_ADDR to rank 0's host."
        )
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    return RankEnv(
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_LOCALID"),
        world_size,
        _number(environment, "SLURM_TASKS_PER_NODE", max(1, world_size // nodes)),
        address,
        _agreed_port(environment, f"{environment.get('SLURM_JOB_ID', '')}.{step}"),
        "srun",
    )


def _from_mpi(environment: Mapping[str, str]) -> RankEnv:
    if "OMPI_COMM_WORLD_RANK" in environment:
        rank, world_size, local_rank, local_size = (
            _number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
    else:
        rank, world_size = _number(environment, "PMI_RANK"), _number(environment, "PMI_SIZE")
        local_size = _number(environment, "MPI_LOCALNRANKS", world_size)
        local_rank = _number(environment, "MPI_LOCALRANKID", rank % local_size)
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local_size == world_size else "")
    if not address:
        raise LaunchError(
            f"mpirun runs {world_size} processes on several hosts. Set MASTER_ADDR to rank 0's host (-x "
            "MASTER_ADDR=...)."
        )
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    if job is None and local_size == world_size:
        # All ranks of one host are children of the same mpirun or of its one helper.
        job = str(os.getppid())
    if job is None and not environment.get("MASTER_PORT"):
        raise LaunchError(
            "mpirun runs several hosts and names no job. Set MASTER_PORT to a free port on rank 0's host."
        )
    return RankEnv(rank, local_rank, world_size, local_size, address, _agreed_port(environment, job or ""), "mpirun")


def _alone(environment: Mapping[str, str]) -> RankEnv:
    return RankEnv(0, 0, 1, 1, "127.0.0.1", _number(environment, "MASTER_PORT", 0) or free_port(), "alone")


def first_host(node_list: str) -> str:
    """The first host of a Slurm list such as `node[03-07,9],gpu1`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?", node_list)
    return "" if match is None else match[1] + (match[2] or "")


def _agreed_port(environment: Mapping[str, str], job: str) -> int:
    """The same port on every rank without asking: given, or by the job's name."""
    return _number(environment, "MASTER_PORT", _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if not text:
        if default is None:
            raise LaunchError(
                f"the environment variable {name} is not set. The program that starts the processes must set it."
            )
        return default
    # SLURM_TASKS_PER_NODE may read `4(x2)`.
    match = re.match(r"\d+", text)
    if match is None:
        raise LaunchError(f"the environment variable {name} = {text} is not a whole number.")
    return int(match[0])
