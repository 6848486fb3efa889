"""The pool itself: results arrive, failures and hangs surface with their rank, nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.pool import RankFailure, RankPool, cases


def _is_alive(pid: int) -> bool:
    try:
        # A zombie that its new parent has not collected yet is not alive.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _await_end(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + 10
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [pid for pid in pids if _is_alive(pid)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_in_rank_order(ranks, world_size):
    assert ranks(cases.coordinates, world_size) == [(r, world_size, r, "127.0.0.1") for r in range(world_size)]


def test_two_ranks_reduce(ranks):
    results = ranks(cases.reduced_sum, 2, 0.5)
    assert all(torch.equal(result, torch.tensor([0.0, 1.5, 3.0])) for result in results)


def test_every_case_starts_from_the_same_state(ranks):
    first = ranks(cases.generators, 2)
    assert first == ranks(cases.generators, 2)
    assert first[0] == first[1]
    assert first[0][1] == 1


def test_a_deepspeed_case_trains_and_is_quick(ranks):
    ranks(cases.coordinates, 1)
    start = time.monotonic()
    results = ranks(cases.train_with_deepspeed, 2, 3, deepspeed=True)
    # 0.2 s on a quiet machine; a fresh interpreter would take at least ten times the bound's tenth.
    assert time.monotonic() - start < 8
    assert results[0][1] == results[1][1]
    assert results[0][0] != results[1][0]


def test_a_failure_names_its_rank_and_shows_traceback_and_output(ranks):
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        ranks(cases.fail_on, 3, 1)
    assert caught.value.rank == 1
    assert "----- rank 1 raised -----" in str(caught.value)
    assert "ArithmeticError: the planted failure" in str(caught.value)
    assert "in fail_on" in str(caught.value)
    assert "a line on stdout" in str(caught.value)
    assert time.monotonic() - start < 30


def test_a_death_without_a_word_is_a_failure(ranks):
    with pytest.raises(RankFailure, match="SIGKILL") as caught:
        ranks(cases.die_on, 2, 0)
    assert caught.value.rank == 0
    assert caught.value.statuses[0] == "died"


def test_a_hang_shows_the_stacks_of_every_rank(ranks):
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        ranks(cases.hang_on, 2, 1, timeout=1.5)
    assert time.monotonic() - start < 15
    message = str(caught.value)
    assert caught.value.statuses == ["hang", "hang"]
    assert "no end after 1.5 s" in message
    assert "_the_function_that_waits" in message
    assert "barrier" in message.split("rank 0 hangs here")[1].split("rank 1 hangs here")[0]


def test_the_pool_works_after_a_hang(ranks):
    with pytest.raises(RankFailure):
        ranks(cases.hang_on, 2, 0, timeout=0.5)
    assert ranks(cases.coordinates, 1) == [(0, 1, 0, "127.0.0.1")]


def test_descendants_of_a_rank_end_with_the_case(ranks, tmp_path):
    ranks(cases.start_descendant, 2, str(tmp_path))
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert _await_end(pids) == []


def test_an_unpicklable_result_is_reported(ranks):
    with pytest.raises(RankFailure, match=r"[Pp]ickle"):
        ranks(cases.unpicklable, 1)


def test_a_function_that_no_rank_can_import_is_refused_at_once(ranks):
    with pytest.raises(ValueError, match="top-level function"):
        ranks(lambda: None, 1)


def test_environment_reaches_the_ranks_only(ranks):
    assert ranks(os.getenv, 2, "POOL_PROBE", environ={"POOL_PROBE": "seen"}) == ["seen", "seen"]
    assert ranks(os.getenv, 1, "POOL_PROBE") == [None]


def test_nothing_survives_a_killed_client(tmp_path):
    """The client is killed in the middle of a case: its server and both ranks go too."""
    script = (
        "import os, pathlib, sys\n"
        "from tests.pool import RankPool, cases\n"
        "pool = RankPool()\n"
        "pool.run_ranks(cases.coordinates, 1)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(pool._server.pid))\n"
        "pool.run_ranks(cases.hang_on, 2, 0, timeout=300)\n"
    )
    root = Path(__file__).resolve().parents[2]
    note = tmp_path / "server.pid"
    environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(root)}
    client = subprocess.Popen([sys.executable, "-c", script, str(note)], env=environ, cwd=root)
    try:
        deadline = time.monotonic() + 120
        pids: list[int] = []
        while len(pids) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
            if note.exists() and note.read_text():
                server = psutil.Process(int(note.read_text()))
                pids = [server.pid, *(child.pid for child in server.children())]
        assert len(pids) == 3
    finally:
        client.kill()
        client.wait()
    assert _await_end(pids) == []


def test_close_is_idempotent_and_removes_its_folder():
    pool = RankPool()
    pool.start()
    folder = Path(pool._folder)
    assert folder.exists()
    pool.close()
    pool.close()
    assert not folder.exists()
