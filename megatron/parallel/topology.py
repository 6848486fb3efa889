"""Rank arithmetic of the pipeline x data x tensor grid.

Pure integers: no process is started, no group is made. The order is upstream's (and DeepSpeed's
`PipeModelDataParallelTopology`): pipeline outermost, data, tensor innermost, so that the ranks of one tensor-parallel
group are neighbours on one machine. Invariant: `coordinates` and `global_rank` are inverse to each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands on each axis."""

    pp_rank: int
    dp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the three axes. `pp_size` is 1 for a model without stages."""

    pp_size: int = 1
    dp_size: int = 1
    tp_size: int = 1

    def __post_init__(self) -> None:
        if min(self.pp_size, self.dp_size, self.tp_size) < 1:
            raise ValueError(f"every axis needs at least one rank, not {self}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp_size * self.dp_size * self.tp_size

    def coordinates(self, global_rank: int) -> Coordinates:
        """The position of `global_rank`. Raises ValueError outside the grid."""
        if not 0 <= global_rank < self.world_size:
            raise ValueError(f"rank {global_rank} is outside of {self}")
        rest, tp_rank = divmod(global_rank, self.tp_size)
        pp_rank, dp_rank = divmod(rest, self.dp_size)
        return Coordinates(pp_rank, dp_rank, tp_rank)

    def global_rank(self, coordinates: Coordinates) -> int:
        """The inverse of `coordinates`."""
        return (coordinates.pp_rank * self.dp_size + coordinates.dp_rank) * self.tp_size + coordinates.tp_rank

    def groups(self, axis: str) -> list[list[int]]:
        """Every group of ranks that differ only along `axis` ("pp", "dp" or "tp"), in rank order."""
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinates(rank)
            fixed = {"pp": at.pp_rank, "dp": at.dp_rank, "tp": at.tp_rank}
            del fixed[axis]
            members.setdefault(tuple(fixed.values()), []).append(rank)
        return list(members.values())

    def __str__(self) -> str:
        return f"tp {self.tp_size} x pp {self.pp_size} x dp {self.dp_size}"
