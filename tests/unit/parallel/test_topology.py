import itertools

import pytest

from megatron.parallel.topology import Coordinates, Topology

SHAPES = list(itertools.product((1, 2, 3), repeat=3))


@pytest.mark.parametrize("shape", SHAPES)
def test_coordinates_and_rank_are_inverse(shape: tuple[int, int, int]) -> None:
    topology = Topology(*shape)
    seen = {topology.coordinates(rank) for rank in range(topology.world_size)}
    assert len(seen) == topology.world_size
    for rank in range(topology.world_size):
        assert topology.global_rank(topology.coordinates(rank)) == rank


def test_order_is_pipe_data_tensor() -> None:
    topology = Topology(pp_size=2, dp_size=2, tp_size=2)
    assert topology.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.coordinates(6) == Coordinates(pp_rank=1, dp_rank=1, tp_rank=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", ["pp", "dp", "tp"])
def test_groups_partition_the_world(shape: tuple[int, int, int], axis: str) -> None:
    topology = Topology(*shape)
    groups = topology.groups(axis)
    assert sorted(itertools.chain(*groups)) == list(range(topology.world_size))
    assert {len(group) for group in groups} == {getattr(topology, f"{axis}_size")}


def test_same_order_as_deepspeed() -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    ours, theirs = Topology(2, 3, 2), PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    for rank in range(ours.world_size):
        at = theirs.get_coord(rank)
        assert ours.coordinates(rank) == Coordinates(at.pipe, at.data, at.model)


def test_refuses_empty_axes_and_foreign_ranks() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        Topology(tp_size=0)
    with pytest.raises(ValueError, match="outside"):
        Topology(2, 2, 2).coordinates(8)
