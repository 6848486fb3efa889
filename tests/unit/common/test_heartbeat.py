"""Whose signs of life count: the main thread's, another's only while that is waited for, and a long call's own work."""

from __future__ import annotations

import threading

import numpy as np

from megatron.common import heartbeat


def in_thread(work) -> None:  # type: ignore[no-untyped-def]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_work_beside_the_main_thread_is_no_sign_of_its_life() -> None:
    heartbeat.beat()
    before = heartbeat.last().at
    in_thread(heartbeat.beat)
    assert heartbeat.last().at == before
    heartbeat.beat()
    assert heartbeat.last().at > before


def test_a_thread_that_is_waited_for_stands_in() -> None:
    with heartbeat.helped():
        before = heartbeat.last().at
        in_thread(heartbeat.beat)
        assert heartbeat.last().at > before
        before = heartbeat.last().at
        # Without its beats, waiting is no progress.
        in_thread(lambda: None)
        assert heartbeat.last().at == before
    after = heartbeat.last().at
    in_thread(heartbeat.beat)
    assert heartbeat.last().at == after


def test_a_long_call_goes_on_as_long_as_it_computes() -> None:
    with heartbeat.busy():
        heartbeat.last()
        before = heartbeat.last().at
        seen: list[float] = []
        in_thread(lambda: seen.append(heartbeat.last().at))
        threading.Event().wait(0.05)  # blocked: no processor time to speak of
        blocked = heartbeat.last().at
        np.sort(np.random.default_rng(0).random(1_000_000))
        in_thread(lambda: seen.append(heartbeat.last().at))
        assert seen[-1] > blocked >= before
    idle = heartbeat.last().at
    np.sort(np.random.default_rng(0).random(100_000))
    assert heartbeat.last().at == idle


def test_a_blocked_call_is_not_taken_for_work() -> None:
    looks: list[float] = []
    release = threading.Event()

    def watch() -> None:
        # The first looks pay for what came before the wait; all later ones see no processor time used.
        for _ in range(200):
            looks.append(heartbeat.last().at)
            threading.Event().wait(0.001)
        release.set()

    with heartbeat.busy():
        watcher = threading.Thread(target=watch)
        watcher.start()
        release.wait(30)
        watcher.join()
    assert len(set(looks[100:])) == 1


def test_busy_within_busy_and_on_other_threads_is_harmless() -> None:
    def other() -> None:
        with heartbeat.busy():
            pass

    with heartbeat.busy():
        with heartbeat.busy():
            pass
        in_thread(other)
        before = heartbeat.last().at
        np.sort(np.random.default_rng(0).random(1_000_000))
        assert heartbeat.last().at > before
