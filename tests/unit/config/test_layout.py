"""World size, layout and batch triple: every way of saying them, and the messages with the user's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.config import layout as layout_module
from tests.unit.config.conftest import TINY


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def offer(number: int) -> None:
        monkeypatch.setattr(layout_module, "count_gpus", lambda: number)

    offer(0)
    return offer


def world(**changes: object) -> tuple[int, int, str]:
    config = load([], {**TINY, **changes})
    return config.parallel.world_size, config.parallel.data_parallel_size, config.launcher.device


def test_cpu_starts_one_replica_or_cpu_processes(gpus: Callable[[int], None]) -> None:
    assert world() == (1, 1, "cpu")
    assert world(pipe_parallel_size=2, model_parallel_size=3) == (6, 1, "cpu")
    assert world(cpu_processes=4, model_parallel_size=2) == (4, 2, "cpu")
    assert world(num_gpus=2) == (2, 2, "cpu")
    assert world(global_num_gpus=6, num_gpus=2) == (6, 6, "cpu")


def test_gpus_are_all_used_and_cpu_processes_then_means_nothing(gpus: Callable[[int], None]) -> None:
    gpus(8)
    assert world() == (8, 8, "cuda")
    assert world(cpu_processes=2, model_parallel_size=2) == (8, 4, "cuda")
    assert world(num_gpus=4) == (4, 4, "cuda")
    assert world(device="cpu") == (1, 1, "cpu")


def test_hostfile_counts_slots(gpus: Callable[[int], None], tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=4\nnode2 slots=2  # spare\n")
    assert world(hostfile=str(path))[0] == 6
    assert world(hostfile=str(path), num_nodes=1)[0] == 4
    assert world(hostfile=str(path), num_gpus=2)[0] == 4
    assert world(hostfile=str(path), exclude="node1:0,1")[0] == 4


def test_a_layout_that_does_not_fit_is_refused_unless_planning(gpus: Callable[[int], None]) -> None:
    gpus(3)
    with pytest.raises(ConfigError, match=r"2 \* 2 = 4 does not divide the 3 processes \(3 GPUs found\)"):
        world(pipe_parallel_size=2, model_parallel_size=2)
    config = load([], {**TINY, "pipe_parallel_size": 2, "model_parallel_size": 2}, planning=True)
    assert config.parallel.world_size == 4
    assert "planning for 4 processes" in config.warnings[0]


def test_cuda_without_a_gpu_is_refused(gpus: Callable[[int], None]) -> None:
    with pytest.raises(ConfigError, match="no GPU is found"):
        world(device="cuda")


def test_devices_override_everything(gpus: Callable[[int], None]) -> None:
    config = load([], {**TINY, "global_num_gpus": 16, "model_parallel_size": 2}, devices=4)
    assert (config.parallel.world_size, config.parallel.data_parallel_size) == (4, 2)


def triple(config: Config) -> tuple[int, int, int]:
    batch = config.batch
    return batch.train_batch_size, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps


@given(micro=st.integers(1, 5), steps=st.integers(1, 5), dp=st.integers(1, 4), keep=st.integers(0, 7))
def test_any_part_of_the_triple_is_enough(micro: int, steps: int, dp: int, keep: int) -> None:
    whole = {
        "train_batch_size": micro * steps * dp,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    given_part = {name: value for bit, (name, value) in enumerate(whole.items()) if keep >> bit & 1}
    solved = triple(load([], {**TINY, **given_part}, devices=dp))
    assert solved[0] == solved[1] * solved[2] * dp
    for value, name in zip(solved, whole, strict=True):
        assert value == given_part.get(name, value)
    if len(given_part) >= 2:
        assert solved == tuple(whole.values())
    elif set(given_part) == {"train_batch_size"}:
        assert solved[2] == 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((16, 4, 3), "train_batch_size = 16 is not train_micro_batch_size_per_gpu * gradient_accumulation_steps * "),
        ((16, 4, 3), "= 4 * 3 * 2 = 24. Set train_batch_size: 24, or gradient_accumulation_steps: 2, or remove"),
        ((7, 2, None), "is not a multiple of train_micro_batch_size_per_gpu * data_parallel_size = 2 * 2 = 4."),
        ((7, 2, None), "Set train_batch_size to 4 or 8."),
        ((7, None, 2), "is not a multiple of gradient_accumulation_steps * data_parallel_size = 2 * 2 = 4."),
        ((7, None, None), "is not a multiple of data_parallel_size = 2. Set train_batch_size to 6 or 8."),
    ],
)
def test_a_batch_that_does_not_come_out_is_refused_with_the_equation(
    refused: Callable[..., str], batch: tuple[int | None, ...], message: str
) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert message in refused(2, **dict(zip(names, batch, strict=True)))


@pytest.mark.parametrize(
    ("changes", "launcher"),
    [
        ({}, "pdsh"),
        ({"deepspeed_slurm": True}, "slurm"),
        ({"deepspeed_slurm": True, "launcher": "slurm"}, "slurm"),
        ({"deepspeed_mpi": True}, "openmpi"),
        ({"deepspeed_mpi": True, "launcher": "mpich"}, "mpich"),
        ({"launcher": "SLURM"}, "slurm"),
    ],
)
def test_one_launcher_of_three_keys(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], launcher: str
) -> None:
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)
    assert load([], {**TINY, **changes}).launcher.launcher == launcher


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"deepspeed_slurm": True, "launcher": "openmpi"},
            "deepspeed_slurm = true is for launcher = slurm, and launcher",
        ),
        ({"deepspeed_mpi": True, "launcher": "pdsh"}, "is for launcher = openmpi or mpich or mvapich or impi, and"),
        ({"deepspeed_mpi": True, "deepspeed_slurm": True}, "deepspeed_mpi = true is for launcher = openmpi"),
    ],
)
def test_launcher_keys_that_contradict(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([], {**TINY, **changes})


def test_an_allocation_counts_its_nodes(gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert world(launcher="slurm") == (3, 3, "cpu")
    assert world(launcher="slurm", cpu_processes=2, model_parallel_size=2) == (6, 3, "cpu")
    assert world(launcher="slurm", num_nodes=2, num_gpus=4) == (8, 8, "cpu")
    assert world(launcher="slurm", model_parallel_size=6) == (6, 1, "cpu")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "a100:4")
    assert world(launcher="slurm") == (12, 12, "cuda")
    assert world() == (1, 1, "cpu")
    with pytest.raises(ConfigError, match="num_nodes = 4, and the allocation has 3"):
        world(launcher="slurm", num_nodes=4)


def test_upstreams_variable_names_a_hostfile(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n")
    monkeypatch.setenv("DLTS_HOSTFILE", str(tmp_path / "hosts"))
    assert world()[0] == 5
    assert world(launcher="slurm")[0] == 1
    config = load([], TINY, devices=1)
    assert config.launcher.hostfile is None
