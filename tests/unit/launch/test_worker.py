"""How a script becomes its rank, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config import load

TINY = "num_layers: 2\nhidden_size: 32\nnum_attention_heads: 2\nseq_length: 16\ntokenizer_type: CharLevelTokenizer\n"
TRAIN = "train_iters: 3\noptimizer: {type: Adam, params: {lr: 1e-3}}\n"
SCRIPT = """
import os, sys
from megatron.common.errors import run_main
from megatron.launch.worker import worker_config
def main():
    c = worker_config(purpose="PURPOSE")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    print(c.parallel.world_size, c.parallel.num_stages, c.training.seed, *[os.environ.get(n) for n in names])
run_main(main)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.yml").write_text(TINY + TRAIN + f"data_path: {tmp_path}/d\ndevice: cpu\n")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").touch()
    return tmp_path


def run(folder: Path, *arguments: str, purpose: str = "train", **environment: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("PURPOSE", purpose))
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**clean, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_alone_it_is_rank_0_of_1(folder: Path) -> None:
    result = run(folder, str(folder / "my"), "--set", "seed=9")
    assert result.stdout == "1 1 9 0 0 1 cpu 1\n", result.stderr


def test_under_torchrun_and_srun_it_is_that_rank(folder: Path) -> None:
    five = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert run(folder, "my", "-d", str(folder), **five).stdout == "2 1 1234 1 1 2 cpu 1\n"
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    assert run(folder, str(folder / "my.yml"), **slurm).stdout == "4 1 1234 3 1 4 cpu 1\n"


def test_resolved_configuration(folder: Path) -> None:
    config = load([folder / "my.yml"], {"seed": 3}, devices=1)
    (folder / "private").mkdir()
    path = folder / "private" / "c.json"
    config.write(path)
    assert run(folder, "--config", str(path)).stdout == "1 1 3 0 0 1 cpu 1\n"
    assert path.exists()
    assert run(folder, "--config", str(path), MEGATRON_REMOVE_CONFIG=str(path)).returncode == 0
    assert not path.parent.exists(), "a run of one process removes it once it is read"


def test_inference_needs_no_training_keys_and_one_stage(folder: Path) -> None:
    path = folder / "model.yml"
    path.write_text(TINY + "pipe_parallel_size: 2\ndevice: cpu\n")
    assert run(folder, str(path), purpose="generate").stdout == "1 1 1234 0 0 1 cpu 1\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        ((), {}, 2, "no configuration file is given"),
        (("absent.yml",), {}, 2, "no such configuration file"),
        (("MY", "--nonsense"), {}, 2, "unrecognized arguments: --nonsense"),
        (("MY", "--set", "seed"), {}, 2, "write KEY=VALUE"),
        (("MY", "--set", "data_path=absent"), {}, 4, "absent.bin and absent.idx not found"),
        (("MY", "--set", "train_iters=0"), {}, 2, "train_iters is missing or 0"),
        (("MY",), {"RANK": "1", "WORLD_SIZE": "2"}, 3, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (("--config", "CONFIG"), {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
         3, "is for 1 processes and 2 are running (srun)"),
    ],
)  # fmt: skip
def test_mistakes_have_their_exit_code_and_no_traceback(
    folder: Path, arguments: tuple[str, ...], environment: dict[str, str], code: int, message: str
) -> None:
    load([folder / "my.yml"], devices=1).write(folder / "c.json")
    names = {"MY": str(folder / "my.yml"), "CONFIG": str(folder / "c.json")}
    result = run(folder, *[names.get(argument, argument) for argument in arguments], **environment)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
