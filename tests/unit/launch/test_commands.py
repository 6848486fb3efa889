"""Each rank's command and environment."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from megatron.common.errors import LaunchError
from megatron.config import Config, load
from megatron.launch import commands as commands_module
from megatron.launch.commands import rank_commands

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 16,
    "tokenizer_type": "CharLevelTokenizer",
    "device": "cpu",
}


def config(**changes: Any) -> Config:
    return load([], {**TINY, **changes})


def test_ranks_differ_in_their_rank_only() -> None:
    commands = rank_commands(config(cpu_processes=3), "train.py", "c.json", {})
    assert [command.rank for command in commands] == [0, 1, 2]
    for command in commands:
        assert command.arguments == [sys.executable, "-u", "train.py", "--config", "c.json"]
        assert command.added["RANK"] == command.added["LOCAL_RANK"] == str(command.rank)
        assert (command.added["WORLD_SIZE"], command.added["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert command.added["DS_ACCELERATOR"] == "cpu"
        assert {**command.added, "RANK": "", "LOCAL_RANK": ""} == {**commands[0].added, "RANK": "", "LOCAL_RANK": ""}


def test_port_is_free_unless_given() -> None:
    ports = {rank_commands(config(), "t.py", "c", {})[0].added["MASTER_PORT"] for _ in range(8)}
    assert len(ports) > 1
    assert rank_commands(config(master_port=777), "t.py", "c", {})[0].added["MASTER_PORT"] == "777"
    assert rank_commands(config(), "t.py", "c", {"MASTER_PORT": "778"})[0].added["MASTER_PORT"] == "778"


def test_threads_share_the_cores_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_module, "count_cores", lambda: 8)
    assert rank_commands(config(cpu_processes=3), "t.py", "c", {})[0].added["OMP_NUM_THREADS"] == "2"
    assert rank_commands(config(cpu_processes=20), "t.py", "c", {})[0].added["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_commands(config(), "t.py", "c", {"OMP_NUM_THREADS": "5"})[0].added


def test_shell_line_quotes() -> None:
    line = rank_commands(config(), "my train.py", "c d.json", {})[0].shell_line()
    assert "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1" in line
    assert "'my train.py' --config 'c d.json'" in line


def test_other_hosts_are_refused_with_the_way_to_do_it() -> None:
    with pytest.raises(LaunchError, match=r"num_nodes = 2.*under srun, mpirun or torchrun") as caught:
        rank_commands(config(num_nodes=2), "t.py", "c", {})
    assert caught.value.exit_code == 3


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_module, "count_gpus", lambda environment: 2)
    wanted = config(num_gpus=4).replace(device="cuda")
    with pytest.raises(LaunchError, match=r"needs 4 GPUs .* this host offers 2"):
        rank_commands(wanted, "t.py", "c", {})
    assert "DS_ACCELERATOR" not in rank_commands(config(num_gpus=2).replace(device="cuda"), "t.py", "c", {})[0].added
