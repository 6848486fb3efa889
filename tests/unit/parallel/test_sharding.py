import pytest
import torch

from megatron.parallel.init import fill_from
from megatron.parallel.layers import sharded_parameter
from megatron.parallel.sharding import ShardSpec, get_shard_spec


@pytest.mark.parametrize(
    ("shape", "dim", "tp_size"), [((6, 5), 0, 3), ((5, 8), 1, 4), ((12,), 0, 2), ((7, 3), None, 4)]
)
def test_shards_side_by_side_are_the_logical_tensor(shape: tuple[int, ...], dim: int | None, tp_size: int) -> None:
    spec = ShardSpec(shape, dim)
    logical = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    shards = [spec.take(logical, rank, tp_size) for rank in range(tp_size)]
    assert all(tuple(shard.shape) == spec.shard_shape(tp_size) for shard in shards)
    if dim is None:
        assert all(torch.equal(shard, logical) for shard in shards)
    else:
        assert torch.equal(torch.cat(shards, dim), logical)


def test_refuses_a_dimension_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide over 4 ranks"):
        ShardSpec((6, 5), 0).shard_shape(4)


def test_refuses_a_tensor_of_another_shape() -> None:
    with pytest.raises(ValueError, match="logical shape"):
        ShardSpec((6, 5), 0).take(torch.zeros(5, 6), 0, 2)


def _draw(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, 1.0, generator=generator)


@pytest.mark.parametrize(("shape", "dim"), [((8, 6), 0), ((6, 8), 1)])
def test_initial_values_do_not_depend_on_the_layout(shape: tuple[int, int], dim: int) -> None:
    def fill(name: str, tp_size: int, seed: int = 7) -> torch.Tensor:
        shards = []
        for rank in range(tp_size):
            parameter = sharded_parameter(shape, dim, tp_size)
            fill_from(parameter, name, _draw, seed=seed, tp_rank=rank, tp_size=tp_size)
            shards.append(parameter.detach())
        return torch.cat(shards, dim)

    assert torch.equal(fill("a", 1), fill("a", 2))
    assert torch.equal(fill("a", 1), fill("a", 4 if shape[dim] % 4 == 0 else 2))
    assert not torch.equal(fill("a", 1), fill("b", 1))
    assert not torch.equal(fill("a", 1), fill("a", 1, seed=8))


def test_marks_by_which_deepspeed_tells_sharded_parameters() -> None:
    assert sharded_parameter((4, 4), 0, 2).tensor_model_parallel
    assert not hasattr(sharded_parameter((4, 4), None, 2), "tensor_model_parallel")
    assert get_shard_spec(sharded_parameter((4, 4), 1, 2)) == ShardSpec((4, 4), 1)
