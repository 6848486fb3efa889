"""What the user sees of an error, and the exit code."""

from __future__ import annotations

import os
import sys

import pytest

from megatron.common.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    MegatronError,
    NonFiniteLossError,
    WatchdogError,
    run_main,
)


def ended(error: BaseException) -> int:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return int(str(caught.value.code))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MEGATRON_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (MegatronError, 1),
        (ConfigError, 2),
        (LaunchError, 3),
        (DataError, 4),
        (CheckpointError, 5),
        (NonFiniteLossError, 6),
        (WatchdogError, 7),
    ],
)
def test_an_error_of_ours_is_one_message(
    capsys: pytest.CaptureFixture[str], kind: type[MegatronError], code: int
) -> None:
    assert ended(kind("a.yml:3: no such key")) == code
    assert capsys.readouterr().err == "error: a.yml:3: no such key\n"


def test_debugging_shows_the_traceback_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_DEBUG", "1")
    assert ended(DataError("gone")) == 4
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("error: gone\n")


def test_a_defect_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(ValueError("odd")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("ValueError: odd\n")


def test_one_of_several_ranks_says_so_in_every_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ended(DataError("a\n\nb")) == 4
    front = f"[rank 1 on {os.uname().nodename}] "
    assert capsys.readouterr().err == f"{front}error: a\n{front}\n{front}b\n"


def test_codes_of_ends_without_an_error() -> None:
    assert ended(KeyboardInterrupt()) == 130
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: None)
    assert caught.value.code == 0
