"""Signals as exceptions and as a question, in this very process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.common.errors import DataError, Stopped
from megatron.common.files import atomic_write
from megatron.common.stop import STOP_SIGNALS, StopSignals

ROOT = Path(__file__).parents[3]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_where_the_work_is(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    signals = StopSignals()

    def work() -> None:
        with signals, atomic_write(tmp_path / "file"):
            send(number)
            pytest.fail("the work went on")

    with pytest.raises(Stopped) as caught:
        work()
    assert (caught.value.number, caught.value.exit_code, signals.asked()) == (number, 128 + number, number)
    assert str(caught.value) == f"stopped by {signal.Signals(number).name}"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_deferred_it_is_noted_and_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as signals:
        with signals.deferred("after this step"):
            assert signals.asked() == 0
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                send(number)
            assert signals.asked() == signal.SIGTERM
        # Already leaving: a repetition must not cut short what is done to leave.
        send(signal.SIGTERM)
    assert capfd.readouterr().err == "\nSIGTERM: after this step\n"


def test_only_rank_0_tells(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with StopSignals() as signals, signals.deferred("after this step"):
        send(signal.SIGTERM)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_further_interrupt_is_obeyed_at_once(first: int) -> None:
    def work() -> None:
        with StopSignals() as signals, signals.deferred("later"):
            send(first)
            send(signal.SIGINT)
            pytest.fail("the work went on")

    with pytest.raises(Stopped) as caught:
        work()
    assert caught.value.exit_code == 130


def test_a_repeated_sigterm_lets_the_cleaning_up_end() -> None:
    cleaned = False

    def work() -> None:
        nonlocal cleaned
        with StopSignals():
            try:
                send(signal.SIGTERM)
            finally:
                send(signal.SIGTERM)
                cleaned = True

    with pytest.raises(Stopped):
        work()
    assert cleaned


def break_while_leaving(error: Exception) -> None:
    with StopSignals():
        try:
            send(signal.SIGTERM)
        finally:
            raise error


def test_what_breaks_while_leaving_is_a_consequence_but_our_own_errors_are_news() -> None:
    with pytest.raises(Stopped) as caught:
        break_while_leaving(RuntimeError("connection closed by peer"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(DataError, match="disk"):
        break_while_leaving(DataError("disk full"))


def test_what_breaks_while_the_work_goes_on_is_news() -> None:
    def work() -> None:
        with StopSignals() as signals, signals.deferred("later"):
            send(signal.SIGTERM)
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        work()


def test_what_the_parent_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGUSR1)
            assert signals.asked() == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_command_ends_with_its_code_and_one_line(tmp_path: Path, number: int) -> None:
    (tmp_path / "command.py").write_text("import os\ndef main():\n    os.kill(os.getpid(), " + str(int(number)) + ")\n")
    program = "from megatron.common.interpreter import run_command; run_command('command')"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (128 + number, f"stopped by {signal.Signals(number).name}\n")
