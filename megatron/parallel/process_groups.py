"""The process groups of one rank, frozen and handed on explicitly; there is no module global.

Invariant: every rank creates every group in the same order, as torch.distributed requires.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron.parallel.topology import Coordinates, Topology


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the grid and the groups that it talks in.

    `tp` and `dp` are None where the axis has one rank: layers then skip the collective altogether.
    sequence_parallel: outside of tensor-parallel layers each tensor-parallel rank holds a part of the tokens.
    sums_in_fp32: tensor-parallel sums of half-precision tensors are made in fp32 (fp32_allreduce).
    """

    topology: Topology
    global_rank: int
    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    sums_in_fp32: bool = False

    @property
    def at(self) -> Coordinates:
        """This rank's coordinates."""
        return self.topology.coordinates(self.global_rank)

    @property
    def tp_rank(self) -> int:
        """Rank along the tensor axis."""
        return self.at.tp_rank

    @property
    def tp_size(self) -> int:
        """Ranks along the tensor axis."""
        return self.topology.tp_size

    @property
    def dp_rank(self) -> int:
        """Rank along the data axis."""
        return self.at.dp_rank

    @property
    def dp_size(self) -> int:
        """Ranks along the data axis."""
        return self.topology.dp_size

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks to the user and writes what is written once."""
        return self.global_rank == 0

    @classmethod
    def single(cls) -> ProcessGroups:
        """One process that holds everything; needs no torch.distributed."""
        return cls(Topology(), 0)

    @classmethod
    def build(cls, topology: Topology, *, sequence_parallel: bool = False, sums_in_fp32: bool = False) -> ProcessGroups:
        """Make the groups on every rank of an initialised torch.distributed. Collective.

        Raises ValueError if the world has another size than the topology.
        """
        world_size, global_rank = dist.get_world_size(), dist.get_rank()
        if world_size != topology.world_size:
            raise ValueError(f"{topology} needs {topology.world_size} processes, and {world_size} are running")
        mine: dict[str, dist.ProcessGroup | None] = {}
        for axis, size in (("tp", topology.tp_size), ("dp", topology.dp_size)):
            mine[axis] = None
            if size == 1:
                continue
            for ranks in topology.groups(axis):
                group = dist.new_group(ranks)
                if global_rank in ranks:
                    mine[axis] = group
        is_split = sequence_parallel and topology.tp_size > 1
        return cls(topology, global_rank, mine["tp"], mine["dp"], is_split, sums_in_fp32)
