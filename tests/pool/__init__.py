"""A warm pool that runs one function on several ranks, each a fresh process, within tenths of a second."""

from tests.pool.pool import RankFailure, RankPool

__all__ = ["RankFailure", "RankPool"]
