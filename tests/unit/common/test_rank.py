"""Which rank this process is, from the environments that torchrun, srun, mpirun or nobody leave."""

from __future__ import annotations

import socket

import pytest

from megatron.common.errors import LaunchError
from megatron.common.rank import RankEnv, detect_rank, first_host, free_port, starter_of

FIVE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "gpu[03-04,9]",
}
OMPI = {
    f"OMPI_COMM_WORLD_{name}": value
    for name, value in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "1212", strict=True)
}


def test_torchrun() -> None:
    environment = {**FIVE, "LOCAL_WORLD_SIZE": "2"}
    assert detect_rank(environment) == RankEnv(3, 1, 4, 2, "node1", 1234, "torchrun")


def test_srun() -> None:
    environment = dict(SLURM)
    found = detect_rank(environment)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (5, 1, 8, 4)
    assert found.master_addr == "gpu03"
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu03"}.items():
        assert environment[name] == value
    assert int(environment["MASTER_PORT"]) == found.master_port


def test_srun_ranks_agree_on_a_port_and_jobs_differ() -> None:
    ports = [detect_rank({**SLURM, "SLURM_PROCID": str(rank)}).master_port for rank in range(8)]
    assert len(set(ports)) == 1
    assert detect_rank({**SLURM, "SLURM_JOB_ID": "78"}).master_port != ports[0]
    assert 20000 <= ports[0] < 32000


def test_srun_by_nodes_and_tasks_per_node() -> None:
    environment = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS"}
    assert detect_rank({**environment, "SLURM_NTASKS_PER_NODE": "4"}).world_size == 8
    with pytest.raises(LaunchError, match="SLURM_NTASKS_PER_NODE is not set"):
        detect_rank(environment)


def test_a_batch_script_outside_srun_is_alone() -> None:
    assert starter_of({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) == "alone"


def test_mpirun_on_one_host() -> None:
    found = detect_rank(dict(OMPI))
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (1, 1, 2, 2)
    assert found.master_addr == "127.0.0.1"
    assert detect_rank(dict(OMPI)).master_port == found.master_port


def test_mpich() -> None:
    found = detect_rank(
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    )
    assert (found.rank, found.local_rank, found.world_size, found.master_port) == (3, 1, 4, 9)


def test_mpirun_on_several_hosts_needs_an_address() -> None:
    with pytest.raises(LaunchError, match="Set MASTER_ADDR"):
        detect_rank({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    with pytest.raises(LaunchError, match="Set MASTER_PORT"):
        detect_rank({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "a"})


def test_alone_gets_all_five_and_a_free_port() -> None:
    environment: dict[str, str] = {}
    assert detect_rank(environment).world_size == 1
    assert environment["RANK"] == environment["LOCAL_RANK"] == "0"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(environment["MASTER_PORT"])))
    assert detect_rank({}).master_port != 29500
    assert detect_rank(dict(environment)).starter == "torchrun", "detecting twice finds the same rank"


@pytest.mark.parametrize("missing", sorted(FIVE))
def test_a_part_of_the_five_is_refused(missing: str) -> None:
    environment = {name: value for name, value in FIVE.items() if name != missing}
    with pytest.raises(LaunchError, match=f"but not {missing}"):
        detect_rank(environment)


def test_contradictions_are_refused() -> None:
    with pytest.raises(LaunchError, match="rank 4 does not lie in a run of 4"):
        detect_rank({**FIVE, "RANK": "4"})
    with pytest.raises(LaunchError, match="WORLD_SIZE = four is not a whole number"):
        detect_rank({**FIVE, "WORLD_SIZE": "four"})


@pytest.mark.parametrize(
    ("listed", "host"),
    [("node1", "node1"), ("a,b", "a"), ("n[01-03]", "n01"), ("n[7,9-12],m", "n7"), ("", "")],
)
def test_first_host(listed: str, host: str) -> None:
    assert first_host(listed) == host


def test_free_ports_differ() -> None:
    assert len({free_port() for _ in range(20)}) > 1
