"""What goes to other hosts, what .deepspeed_env adds, and that secrets are not shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.common.errors import LaunchError
from megatron.launch.environment import exported, is_secret, read_env_file, shown


def test_only_what_a_run_needs_goes_to_other_hosts() -> None:
    needed = {"NCCL_DEBUG": "INFO", "PATH": "/bin", "WANDB_API_KEY": "k", "PYTHONPATH": "x", "OMP_NUM_THREADS": "4"}
    own = {
        "CUDA_VISIBLE_DEVICES": "1",
        "HOSTNAME": "h",
        "SSH_AUTH_SOCK": "s",
        "HOME": "/h",
        "SLURM_PROCID": "0",
        "A": "b",
    }
    assert exported({**needed, **own}) == needed


def test_the_file_of_this_folder_comes_after_that_of_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert read_env_file({}) == {}
    (home / ".deepspeed_env").write_text("A=1\nB=of home\n")
    (here / ".deepspeed_env").write_text("# comment\n\nexport B = 'x=y'\nC=\n")
    assert read_env_file({}) == {"A": "1", "B": "x=y", "C": ""}
    (here / "other").write_text("D=1\n")
    assert read_env_file({"DS_ENV_FILE": "other"}) == {"D": "1"}
    assert read_env_file({"DS_ENV_FILE": str(here / "other")}) == {"D": "1"}


@pytest.mark.parametrize("line", ["just words with hunter2", "1A=hunter2", "=hunter2"])
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "env"
    path.write_text(f"A=1\n{line}\n")
    with pytest.raises(LaunchError) as caught:
        read_env_file({"DS_ENV_FILE": str(path)})
    assert str(caught.value) == f"{path}:2: this line is not of the form NAME=VALUE."


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "gh_token"]
)
def test_secrets_are_not_shown(name: str) -> None:
    assert is_secret(name)
    assert shown(name, "hunter2") == "***"


def test_passwords_in_addresses_are_not_shown() -> None:
    assert shown("https_proxy", "http://me:hunter2@proxy:3128") == "http://***@proxy:3128"
    assert shown("NCCL_DEBUG", "INFO") == "INFO"
