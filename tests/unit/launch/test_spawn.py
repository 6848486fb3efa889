"""Output, failures and signals of several ranks, and that nothing is left running, whatever ends the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LAUNCHER = """
import os, sys
from megatron.launch import spawn
from megatron.launch.commands import RankCommand
from megatron.launch.spawn import run_ranks
if "PATIENCE_S" in os.environ:
    spawn.OWN_END_S = spawn.TERM_S = float(os.environ["PATIENCE_S"])
script, world = sys.argv[1], int(sys.argv[2])
commands = [RankCommand(r, [sys.executable, "-u", script], {"RANK": str(r)}) for r in range(world)]
sys.exit(run_ranks(commands, grace_mins=float(os.environ.get("GRACE_MINS", "10"))))
"""
PREAMBLE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(os.path.join(os.path.dirname(__file__), f"pid{rank}"), "w").write(str(os.getpid()))
"""


class Job:
    def __init__(self, folder: Path, body: str, world: int) -> None:
        self.folder, self.world = folder, world
        script = folder / "rank.py"
        script.write_text(PREAMBLE + body)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(script), str(world)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout: float = 30) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def pids(self) -> list[int]:
        deadline = time.monotonic() + 20
        files = [self.folder / f"pid{rank}" for rank in range(self.world)]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def wait_until_gone(self, pids: list[int], timeout: float = 5) -> None:
        deadline = time.monotonic() + timeout
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() < deadline, "a rank is still running"
            time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    started: list[Job] = []

    def start(body: str, world: int = 3) -> Job:
        started.append(Job(tmp_path, body, world))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_output_of_rank_0_is_plain_and_of_others_marked(job: Callable[..., Job]) -> None:
    code, out, err = job("print('out', rank); print('err', rank, file=sys.stderr)").end()
    assert code == 0
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["[rank 1] err 1", "[rank 1] out 1", "[rank 2] err 2", "[rank 2] out 2", "err 0"]


def test_first_failure_gives_code_and_last_words_and_ends_the_others(job: Callable[..., Job]) -> None:
    body = "if rank == 1:\n    print('broken disk', file=sys.stderr); sys.exit(5)\ntime.sleep(60)"
    started = time.monotonic()
    one = job(body)
    code, _, err = one.end()
    assert code == 5
    assert err.rstrip().endswith("rank 1 failed with exit code 5, the first to do so. Its last words:\nbroken disk")
    assert time.monotonic() - started < 15
    one.wait_until_gone(one.pids(), 0.5)


RAISING = """
os.environ["WORLD_SIZE"] = "3"
from megatron.common.errors import DataError, run_main
def main():
    %s
run_main(main)
"""


def front(ranks: str) -> str:
    return f"[{ranks} on {os.uname().nodename}]"


def test_an_error_of_all_ranks_is_shown_once(job: Callable[..., Job]) -> None:
    code, _, err = job(RAISING % 'raise DataError("a.bin is gone.\\nb.bin is gone.")').end()
    assert code == 4
    shown, how = err.rstrip().split("\n\n")
    assert shown == f"{front('all 3 ranks')} error: a.bin is gone.\nb.bin is gone."
    assert how.endswith("failed with exit code 4, the first to do so.")


def test_errors_that_differ_are_all_shown(job: Callable[..., Job]) -> None:
    code, _, err = job(RAISING % "time.sleep(0.2 * (rank == 1)); raise DataError(f'file {rank // 2} is gone')").end()
    assert code == 4
    assert f"{front('ranks 0-1')} error: file 0 is gone\n" in err
    assert f"{front('rank 2')} error: file 1 is gone\n" in err
    assert err.count("is gone") == 2


def test_a_traceback_of_all_ranks_is_shown_once(job: Callable[..., Job]) -> None:
    code, _, err = job(RAISING % "raise ZeroDivisionError('no layers')").end()
    assert code == 1
    assert err.startswith(f"{front('all 3 ranks')} Traceback (most recent call last):\n")
    assert err.count("ZeroDivisionError: no layers\n") == 1


def test_the_error_of_a_rank_that_does_not_end_is_shown_meanwhile(job: Callable[..., Job]) -> None:
    body = "if rank == 1:\n    print('[rank 1 on h] error: stuck', file=sys.stderr)\ntime.sleep(60)"
    one = job(body, 2)
    assert one.process.stderr is not None
    started = time.monotonic()
    assert one.process.stderr.readline() == "[rank 1 on h] error: stuck\n"
    assert time.monotonic() - started < 20


def test_a_rank_that_ignores_sigterm_is_killed(job: Callable[..., Job]) -> None:
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 0:\n    time.sleep(1); sys.exit(9)\ntime.sleep(60)"
    )
    one = job(body, 2)
    assert one.end()[0] == 9
    one.wait_until_gone(one.pids(), 0.5)


def test_a_rank_that_a_signal_ends_counts_128_and_its_number(job: Callable[..., Job]) -> None:
    code, _, err = job("if rank == 2:\n    os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)").end()
    assert code == 128 + signal.SIGSEGV
    assert "rank 2 was ended by SIGSEGV" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank_once(job: Callable[..., Job], number: int) -> None:
    body = (
        "seen = []\n"
        f"signal.signal({int(number)}, lambda *_: seen.append(1))\n"
        "open(os.path.join(os.path.dirname(__file__), f'ready{rank}'), 'w').close()\n"
        "deadline = time.monotonic() + 60\n"
        "while not seen and time.monotonic() < deadline: time.sleep(0.02)\n"
        "time.sleep(0.3)\n"
        "print('seen', len(seen))"
    )
    one = job(body)
    one.pids()
    while not all((one.folder / f"ready{rank}").exists() for rank in range(3)):
        time.sleep(0.02)
    one.process.send_signal(number)
    code, out, err = one.end()
    assert code == 0
    assert out == "seen 1\n"
    assert sorted(err.splitlines()) == ["[rank 1] seen 1", "[rank 2] seen 1"]


def ready(one: Job) -> None:
    deadline = time.monotonic() + 20
    while not all((one.folder / f"ready{rank}").exists() for rank in range(one.world)):
        assert time.monotonic() < deadline, "the ranks did not get ready"
        time.sleep(0.02)


READY = "open(os.path.join(os.path.dirname(__file__), f'ready{rank}'), 'w').close()\n"


def test_a_further_interrupt_ends_ranks_that_do_not_listen(job: Callable[..., Job]) -> None:
    one = job("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + READY + "time.sleep(60)", 2)
    pids = one.pids()
    ready(one)
    for _ in range(2):
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert one.end(10)[0] == 128 + signal.SIGINT
    one.wait_until_gone(pids, 0.5)


LEAVING = (
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(%s), print('saved'), sys.exit(143)))\n"
    + READY
    + "time.sleep(60)"
)


def test_a_stop_leaves_slower_ranks_the_time_to_save(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a failure leaves them, however often SIGTERM comes."""
    monkeypatch.setenv("PATIENCE_S", "0.1")
    one = job(LEAVING % "1 + 2 * (rank == 1)", 2)
    ready(one)
    for _ in range(3):
        one.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    code, out, err = one.end()
    assert (code, out.splitlines()[0]) == (143, "saved")
    assert "[rank 1] saved\n" in err
    assert "failed" not in err


def test_a_stop_of_one_rank_stops_all(job: Callable[..., Job]) -> None:
    one = job(LEAVING % "0", 3)
    pids = one.pids()
    ready(one)
    os.kill(pids[2], signal.SIGTERM)
    code, out, err = one.end()
    assert (code, out) == (143, "saved\n")
    assert sorted(err.splitlines()) == ["[rank 1] saved", "[rank 2] saved"]


def test_a_failure_while_stopping_is_a_failure(job: Callable[..., Job]) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143 if rank else 5))\n" + READY + "time.sleep(60)"
    one = job(body, 2)
    ready(one)
    one.process.send_signal(signal.SIGTERM)
    code, _, err = one.end()
    assert code == 5
    assert "rank 0 failed with exit code 5" in err


def test_the_time_to_leave_is_limited(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_MINS", "0.005")
    one = job("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(60)", 2)
    pids = one.pids()
    ready(one)
    one.process.send_signal(signal.SIGTERM)
    code, _, err = one.end(10)
    assert code == 143
    assert "SIGTERM was 0.005 minutes ago (exit_grace_in_mins)" in err
    one.wait_until_gone(pids, 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_killing_the_launcher_ends_the_ranks(job: Callable[..., Job]) -> None:
    one = job("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    pids = one.pids()
    assert all(is_running(pid) for pid in pids)
    os.kill(one.process.pid, signal.SIGKILL)
    one.wait_until_gone(pids)


def test_what_a_rank_started_ends_with_it(job: Callable[..., Job]) -> None:
    body = (
        "import subprocess\n"
        "if rank == 1:\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    open(os.path.join(os.path.dirname(__file__), 'child'), 'w').write(str(child.pid))\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(os.path.join(os.path.dirname(__file__), 'child')): time.sleep(0.02)\n"
        "sys.exit(4)"
    )
    one = job(body, 2)
    assert one.end()[0] == 4
    one.wait_until_gone([int((one.folder / "child").read_text())])
