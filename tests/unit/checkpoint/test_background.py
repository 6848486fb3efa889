"""Saving in the background: the copy stands still, failures are told and tried again, all ranks see the same end."""

from __future__ import annotations

import threading

import pytest
import torch

from megatron.checkpoint import Piece, Saved
from megatron.checkpoint.background import BackgroundSaver
from megatron.checkpoint.snapshot import Snapshot
from megatron.common.errors import CheckpointError
from megatron.parallel.sharding import ShardSpec
from tests.unit.checkpoint.saving import together

SAVED = Saved(None, 7)  # type: ignore[arg-type]


def test_a_snapshot_does_not_follow_and_uses_its_memory_again() -> None:
    spec = ShardSpec((3, 4), 0)
    first, second = torch.randn(12), torch.randn(2, 6).t()  # the second is not contiguous
    pieces = [
        Piece.whole("a", "weight", spec, first),
        Piece.whole("a", "exp_avg", spec, second),
        Piece("a", "weight", spec, 0, 1, 3, 3, torch.empty(0, dtype=torch.bfloat16)),
    ]
    snapshot = Snapshot()
    copies = snapshot.take(iter(pieces))
    before = [piece.tensor.clone().reshape(-1) for piece in pieces]
    addresses = [copy.tensor.data_ptr() for copy in copies]
    first.zero_()
    assert [copy.key for copy in copies] == [piece.key for piece in pieces]
    assert all(torch.equal(copy.tensor, values) for copy, values in zip(copies, before, strict=True))
    copies = snapshot.take(iter(pieces))
    assert torch.equal(copies[0].tensor, first)
    assert [copy.tensor.data_ptr() for copy in copies] == addresses


def test_failures_are_told_and_tried_again() -> None:
    saver, left = BackgroundSaver(lambda ok: ok, pauses_s=(0.0, 0.0)), [CheckpointError("full."), CheckpointError("-")]

    def work() -> Saved:
        if left:
            raise left.pop(0)
        return SAVED

    saver.start(3, work)
    outcome = saver.wait()
    assert outcome is not None
    assert (outcome.step, outcome.saved, outcome.error) == (3, SAVED, None)
    assert saver.notes() == ["full. It is tried again in the background.", "- It is tried again in the background."]
    assert saver.notes() == []
    assert saver.wait() is None
    assert saver.poll() is None


@pytest.mark.parametrize(("error", "attempts"), [(CheckpointError("full"), 3), (RuntimeError("peer gone"), 1)])
def test_the_last_failure_is_the_outcome(error: Exception, attempts: int) -> None:
    saver, made = BackgroundSaver(lambda ok: ok, pauses_s=(0.0, 0.0)), []

    def work() -> Saved:
        made.append(1)
        raise error

    saver.start(3, work)
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.error is error
    assert outcome.saved is None
    assert len(made) == attempts
    assert len(saver.notes()) == attempts - 1


def test_waiting_cuts_a_long_pause_short() -> None:
    saver, failing = BackgroundSaver(lambda ok: ok, pauses_s=(3600.0,)), [CheckpointError("once")]

    def work() -> Saved:
        if failing:
            raise failing.pop()
        return SAVED

    saver.start(3, work)
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.saved is SAVED


def test_all_ranks_see_the_end_at_the_same_poll() -> None:
    """Rank 1's thread ends only after everyone has polled twice."""
    gate = threading.Event()

    def one(rank: int, share: object) -> list[bool]:
        saver = BackgroundSaver(lambda ok: all(text == "True" for text in share(str(ok))))  # type: ignore[operator]

        def work() -> Saved:
            if rank == 1:
                assert gate.wait(30)
            return SAVED

        saver.start(1, work)
        polls = [saver.poll() is not None, saver.poll() is not None]
        gate.set()
        while saver.is_busy:
            polls.append(saver.poll() is not None)
        return polls

    first, second, third = together(3, one)
    assert first == second == third
    assert first[:2] == [False, False]
    assert first[-1]
