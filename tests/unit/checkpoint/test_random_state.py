"""Random generators continue as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint import Reader, random_state, save
from megatron.common.errors import CheckpointError


def draw() -> list[float]:
    return [random.gauss(), random.random(), np.random.standard_normal(), np.random.rand(), *torch.rand(2).tolist()]


def test_restore_continues_the_streams_through_a_file(tmp_path: Path) -> None:
    before = random_state.capture()
    try:
        random.gauss(0, 1)  # leaves its second value behind
        np.random.standard_normal(3)
        save(tmp_path, 1, [], {}, rank_tensors=random_state.capture())
        expected = [draw(), draw()]
        torch.rand(5), random.random(), np.random.rand()
        random_state.restore(Reader(tmp_path / "global_step1").rank_tensors(0))
        assert [draw(), draw()] == expected
    finally:
        random_state.restore(before)


def test_a_missing_state_is_named() -> None:
    states = random_state.capture()
    del states["numpy"]
    with pytest.raises(CheckpointError, match=r"'numpy'.*no_load_rng"):
        random_state.restore(states)
