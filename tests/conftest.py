"""Fixtures for every test, and the mark `full`: the larger matrices, which run only when a mark expression asks for
them (`make test-full`)."""

from __future__ import annotations

import os

# Before anything imports torch: several test processes share the machine, and each rank is one of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pool import RankPool

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _rank_variables() -> Iterator[None]:
    """A test that joins a job of its own in this process leaves no rank behind in the environment of the next."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """The warm pool of this pytest process."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks(rank_pool: RankPool) -> Callable[..., list[Any]]:
    """`ranks(function, world_size, *args, timeout=60, deepspeed=False)`: see `RankPool.run_ranks`."""
    return rank_pool.run_ranks


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line("markers", 'full: the larger matrix of layouts; runs with -m "full or not full"')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a mark expression, leave out what is marked."""
    if config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
