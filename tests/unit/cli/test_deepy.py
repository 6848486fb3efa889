"""deepy.py from the outside: plan, dry run, starting, and every mistake before anything starts."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import os, sys
from megatron.common.errors import run_main
from megatron.launch.worker import worker_config
def main():
    c = worker_config()
    print("rank", os.environ["RANK"], "of", c.parallel.world_size, "seed", c.training.seed, sys.argv[1])
run_main(main)
"""
TINY = """num_layers: 2
hidden_size: 32
num_attention_heads: 2
seq_length: 16
tokenizer_type: CharLevelTokenizer
device: cpu
train_iters: 3
optimizer: {type: Adam, params: {lr: 1e-3}}
data_path: d
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my.yml").write_text(TINY)
    for name in ("train.py", "generate.py", "other.py"):
        (tmp_path / name).write_text(SCRIPT)
    for name in ("d.bin", "d.idx"):
        (tmp_path / name).touch()
    (tmp_path / "tmp").mkdir()
    return tmp_path


def deepy(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_plan_of_20b_takes_less_than_one_and_a_half_seconds(folder: Path) -> None:
    # Processor time: on a quiet machine the user waits as long, and on a busy one the test means the same.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = deepy(folder, "--plan", "train.py", str(ROOT / "configs" / "20B.yml"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert "20,554,567,680 unique" in result.stdout
    assert "20,556,201,984 as DeepSpeed counts" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_plan_for_a_number_of_gpus(folder: Path) -> None:
    result = deepy(folder, "--plan", "--gpus", "96", "train.py", str(ROOT / "configs" / "20B.yml"))
    assert "96 processes" in result.stdout
    assert "x 12 replicas" in result.stdout
    assert "on cuda" in result.stdout


def test_plan_needs_no_data(folder: Path) -> None:
    (folder / "d.bin").unlink()
    assert deepy(folder, "--plan", "train.py", "my").returncode == 0


def test_dry_run_prints_every_rank_and_starts_nothing(folder: Path) -> None:
    result = deepy(folder, "--dry-run", "train.py", "my", "--set", "cpu_processes=2", "--write-config", "c.json")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["RANK=0", "RANK=1"]
    assert all(line.endswith("-u train.py --config c.json") for line in lines)
    assert json.loads((folder / "c.json").read_text())["sections"]["launcher"]["cpu_processes"] == 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    by_hand = subprocess.run(
        lines[0], shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert by_hand.stdout.startswith("rank 0 of 2"), by_hand.stderr


def test_two_processes(folder: Path) -> None:
    result = deepy(folder, "train.py", "my.yml", "--set", "cpu_processes=2", "--set", "seed=5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("rank 0 of 2 seed 5 --config")
    assert "[rank 1] rank 1 of 2 seed 5" in result.stderr
    assert list((folder / "tmp").iterdir()) == []


def test_one_process_leaves_nothing_behind(folder: Path) -> None:
    result = deepy(folder, "other.py", "my")
    assert result.stdout.startswith("rank 0 of 1 seed 1234 --config"), result.stderr
    assert list((folder / "tmp").iterdir()) == []


def test_under_srun_it_becomes_that_rank(folder: Path) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    result = deepy(folder, "train.py", "my", **slurm)
    assert result.stdout == "rank 1 of 2 seed 1234 my\n", result.stderr


def test_upstream_flags_become_keys(folder: Path) -> None:
    flags = [
        "--wandb_group",
        "g",
        "--wandb_run_name",
        "r",
        "--wandb_team",
        "t",
        "--iteration",
        "7",
        "-i",
        "in",
        "-o",
        "out",
    ]
    flags += ["--eval_results_prefix", "p", "--set", "load=x", "-d", "."]
    result = deepy(folder, "--dry-run", "--write-config", "c.json", *flags, "train.py", "my", "--eval_tasks", "a", "b")
    assert result.returncode == 0, result.stderr
    sections = json.loads((folder / "c.json").read_text())["sections"]
    assert sections["observe"]["wandb_group"] == "g"
    assert sections["observe"]["wandb_run_name"] == "r"
    assert sections["observe"]["wandb_team"] == "t"
    assert sections["checkpoint"]["iteration"] == 7
    assert sections["generation"]["sample_input_file"] == "in"
    assert sections["generation"]["sample_output_file"] == "out"
    assert sections["evaluation"] == {"eval_tasks": ["a", "b"], "eval_results_prefix": "p"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("trian.py", "my"), 2, "trian.py: there is no such script"),
        (("trian.py", "my"), 2, "Did you mean train.py?"),
        (("train.py", "mx"), 2, "mx.yml: there is no such configuration file"),
        (("train.py",), 2, "the following arguments are required: conf_file"),
        (("train.py", "my", "--autotuning", "tune"), 2, "--autotuning is not supported yet"),
        (("train.py", "my", "--gpus", "2"), 2, "--gpus N needs --plan"),
        (
            ("train.py", "my", "-H", "hosts"),
            3,
            "--hostfile: the address of rank 0, no-such-host.invalid, cannot be resolved on",
        ),
        (("train.py", "my", "-H", "absent"), 2, "hostfile = absent cannot be read"),
        (("train.py", "my", "--set", "data_path=e"), 4, "e.bin and e.idx not found"),
        (("train.py", "my", "--set", "optimizer=null"), 2, "optimizer is missing"),
        (
            ("train.py", "my", "--set", "num_layerz=2"),
            2,
            "--set num_layerz=2: unknown key num_layerz. Did you mean",
        ),
    ],
)
def test_mistakes(folder: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    (folder / "hosts").write_text("no-such-host.invalid slots=1\nb slots=1\n")
    result = deepy(folder, *arguments)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("train.py", "my", "--max-restarts", "-1"), {}, "-1 is not a whole number, 0 or more"),
        (("train.py", "my", "--max-restarts", "2"), {}, "save is not set"),
        (("generate.py", "my", "--max-restarts", "2"), {}, "generate.py writes no checkpoints"),
        (("train.py", "my", "--max-restarts", "2"), {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "here srun starts"),
    ],
)
def test_restarts_that_cannot_be(
    folder: Path, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    result = deepy(folder, *arguments, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_run_of_one_process_is_started_again_too(folder: Path) -> None:
    saves_and_dies = (
        "import os, pathlib\n"
        "step = len(list(pathlib.Path().glob('out/global_step*'))) + 1\n"
        "os.makedirs(f'out/global_step{step}')\n"
        "open(f'out/global_step{step}/manifest.json', 'w').close()\n"
        "print('step', step, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    (folder / "train.py").write_text(saves_and_dies)
    settings = ["--set", "save=out", "--set", "checkpoint_factor=1"]
    result = deepy(folder, "train.py", "my", "--max-restarts", "1", *settings)
    assert result.returncode == 137
    assert result.stdout == "step 1\nstep 2\n"
    assert "not restarted after exit code 137: --max-restarts 1 are used up" in result.stderr
    assert list((folder / "tmp").iterdir()) == []
