"""verify-resume: identical where the run is, the first difference where it is not, and nothing of the run touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.cli import verify_resume
from megatron.common.errors import CheckpointError, ConfigError
from megatron.config import load
from tests.integration.resume_cases import exit_code
from tests.integration.run_cases import train_run, write_config

Ranks = Callable[..., list[Any]]
DROPOUT = {"hidden_dropout": 0.1, "device": "cpu", "eval_iters": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_verified_and_left_alone(
    ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config(tmp_path, **DROPOUT))
    ranks(train_run, 1, config)
    before = contents(tmp_path / "run")
    # Its runs on the warm pool, where they need no start-up; real processes are in the test below.
    monkeypatch.setattr(verify_resume, "run_ranks", lambda commands: ranks(exit_code, 1, commands[0].arguments[3:])[0])
    assert verify_resume.main([config, "--steps", "2", "--work", str(tmp_path / "work")]) == 0
    assert "identical: uninterrupted from step 4 to 6, and continuing from step 5" in capfd.readouterr().out
    assert contents(tmp_path / "run") == before
    assert not (tmp_path / "work").exists()

    # Which steps are made, from where; and what does not do.
    def chosen(at: int | None = None, steps: int = 2, with_next: bool = False, **changes: Any) -> tuple[int, int]:
        resolved = load([config], changes, devices=1)
        _, start, target = verify_resume.choose(resolved, at, steps, with_next=with_next)
        return start.step, target

    assert chosen(steps=4) == (2, 6)
    assert chosen(at=2) == (2, 4)
    assert chosen(with_next=True) == (4, 6)
    assert chosen(at=2, with_next=True) == (2, 4)
    for arguments, words in (
        ({"at": 3}, "--at 3: complete checkpoints in .*: 2, 4, 6"),
        ({"at": 6}, "--at 6 will do|at least 2 steps before train_iters = 6"),
        ({"at": 6, "with_next": True}, "one with another behind it is needed"),
        ({"steps": 5}, "no checkpoint will do"),
        ({"save": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=words):
            chosen(**arguments)  # type: ignore[arg-type]
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "something").touch()
    for wrong in (["--steps", "1"], ["--iteration", "4"], ["--work", str(tmp_path / "work")]):
        with pytest.raises(ConfigError):
            verify_resume.main([config, *wrong])


@pytest.mark.full
def test_the_first_difference_from_the_next_checkpoint_is_told(
    ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two processes; the run itself was continued with another learning rate than its configuration says now."""
    ranks(train_run, 2, str(write_config(tmp_path, exit_interval=4, **DROPOUT)))
    config = str(write_config(tmp_path, num_gpus=2, **DROPOUT))
    assert verify_resume.main([config, "--next"]) == 0
    ranks(train_run, 2, str(write_config(tmp_path, min_lr=0.002, **DROPOUT)))
    config = str(write_config(tmp_path, num_gpus=2, **DROPOUT))
    assert verify_resume.main([config, "--next"]) == 1
    told = capfd.readouterr().out
    assert "DIFFERENT: uninterrupted from step 4 to 6, and the run's own checkpoint of step 6. First:\n  " in told
    assert "embedding.word_embeddings.weight (weight):" in told.split("First:")[1].splitlines()[1]
