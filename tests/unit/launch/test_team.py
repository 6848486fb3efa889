"""Two launchers on this host, as if on two: supervision, outcome, broken connections, strangers at the port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron.launch.job import Host, Job
from megatron.launch.wire import candidate_ports, connect, listen, welcome

ROOT = Path(__file__).parents[3]
PREAMBLE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(os.path.join(os.path.dirname(__file__), f"pid{rank}"), "w").write(str(os.getpid()))
"""


class Pair:
    """The launchers of two hosts with two ranks each."""

    def __init__(self, folder: Path, body: str, grace_mins: float) -> None:
        self.folder = folder
        script = folder / "rank.py"
        script.write_text(PREAMBLE + body)
        hosts = (Host("one", (0, 1)), Host("two", (0, 1)))
        self.job = Job(
            "pdsh", str(script), str(folder), str(folder), hosts, "cpu", "127.0.0.1",
            ports=candidate_ports(), token="t", exit_grace_mins=grace_mins,
        )  # fmt: skip
        file = self.job.write()
        # As pdsh does, hold a stdin open to which nothing is written.
        held, self.starter = os.pipe()
        self.nodes = [
            subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "deepy.py"), "--node", str(file), str(index)],
                stdin=held,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        os.close(held)

    def pids(self) -> list[int]:
        files = [self.folder / f"pid{rank}" for rank in range(4)]
        deadline = time.monotonic() + 30
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[str, str]:
        """The exit code that the first one wrote, and what it said."""
        _, err = self.nodes[0].communicate(timeout=40)
        assert self.nodes[1].wait(timeout=20) == 0
        return (self.folder / "exit_code").read_text().strip(), err


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    started: list[Pair] = []

    def start(body: str, grace_mins: float = 10.0) -> Pair:
        started.append(Pair(tmp_path, body, grace_mins))
        return started[-1]

    yield start
    for one in started:
        for node in one.nodes:
            node.kill()
            node.communicate()
        with contextlib.suppress(OSError):
            os.close(one.starter)


def are_gone(pids: list[int], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(
            Path(f"/proc/{pid}").exists() and "Z (" not in Path(f"/proc/{pid}/status").read_text() for pid in pids
        ):
            return True
        time.sleep(0.05)
    return False


def test_a_rank_of_the_other_host_fails_first(pair: Callable[..., Pair]) -> None:
    one = pair(
        "print('out', rank)\nif rank == 3:\n    print('broken disk', file=sys.stderr); sys.exit(7)\ntime.sleep(60)"
    )
    code, err = one.end()
    assert code == "7"
    name = os.uname().nodename
    assert err.rstrip().endswith(
        f"rank 3 on {name} failed with exit code 7, the first to do so. Its last words:\nbroken disk"
    )
    assert f"[rank 1 on {name}] out 1\n" in err
    assert f"[rank 2 on {name}] out 2\n" in err
    assert are_gone(one.pids(), 1)


READY = "print('ready', file=sys.stderr)\ntime.sleep(60)"


def stop(one: Pair, number: int) -> None:
    """Ask the run to stop, as the front does, once all four ranks are ready."""
    stderr = one.nodes[0].stderr
    assert stderr is not None
    ready = 0
    while ready < 4:
        ready += "ready" in stderr.readline()
    channel = connect("127.0.0.1", one.job.ports, "t", {"signal": number, "host": "h"}, 10)
    assert channel is not None
    channel.close()


def test_signals_reach_the_ranks_of_both(pair: Callable[..., Pair]) -> None:
    one = pair("signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))\n" + READY)
    pids = one.pids()
    stop(one, signal.SIGUSR1)
    assert one.end()[0] == "138"
    assert are_gone(pids, 1)


def test_the_time_to_leave_is_limited_on_both(pair: Callable[..., Pair]) -> None:
    one = pair("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY, 0.005)
    pids = one.pids()
    stop(one, signal.SIGTERM)
    code, err = one.end()
    assert code == "143"
    assert "SIGTERM was 0.005 minutes ago (exit_grace_in_mins)" in err
    assert are_gone(pids, 1)


def test_the_other_host_dies(pair: Callable[..., Pair]) -> None:
    one = pair("time.sleep(60)")
    pids = one.pids()
    one.nodes[1].kill()
    _, err = one.nodes[0].communicate(timeout=40)
    assert (one.folder / "exit_code").read_text() == f"{128 + signal.SIGKILL}\n"
    assert "the host or its launcher died" in err
    assert are_gone(pids)


def test_the_first_host_dies(pair: Callable[..., Pair]) -> None:
    one = pair("time.sleep(60)")
    pids = one.pids()
    one.nodes[0].kill()
    _, err = one.nodes[1].communicate(timeout=40)
    assert "the connection to the launcher on 127.0.0.1 broke" in err
    assert are_gone(pids)


def test_whoever_started_them_dies(pair: Callable[..., Pair]) -> None:
    one = pair("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    pids = one.pids()
    os.close(one.starter)
    assert are_gone(pids, 25)


def test_strangers_are_turned_away_and_the_next_port_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        threading.Thread(target=lambda: stranger.accept()[0].close(), daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        listener = listen([port])
        found: list[object] = []

        def serve() -> None:
            for _ in range(2):
                found.append(welcome(listener.accept()[0], "right"))

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        assert connect("127.0.0.1", [port], "wrong", {"node": 1}, 0.0) is None
        channel = connect("127.0.0.1", [taken, port], "right", {"node": 2}, 10)
        server.join(timeout=10)
        listener.close()
    assert channel is not None
    assert found[0] is None
    assert isinstance(found[1], tuple)
    assert found[1][1] == {"node": 2}
    channel.close()
    found[1][0].close()
