"""Recomputation changes what is kept, and no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.model.build import Transformer
from megatron.model.init import initialize_parameters
from megatron.model.recompute import Recompute, RecomputedGroup, grouped
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import seed_streams
from tests.distributed.layout_cases import tiny_spec


def _gradients(recompute: Recompute) -> dict[str, torch.Tensor]:
    spec, groups = tiny_spec(hidden_dropout=0.2, attention_dropout=0.2, num_layers=5), ProcessGroups.single()
    stream = seed_streams(4, groups, torch.device("cpu"))
    model = Transformer(spec, groups, stream, recompute)
    initialize_parameters(model.named_parameters(), spec, groups, 4)
    torch.manual_seed(9)
    tokens = torch.randint(0, 91, (2, 7), generator=torch.Generator().manual_seed(1))
    model(tokens).pow(2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [Recompute("selective"), *(Recompute("full", size) for size in (1, 2, 3, 7))])
def test_gradients_are_bitwise_the_same(recompute: Recompute) -> None:
    plain, again = _gradients(Recompute()), _gradients(recompute)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_fewer_activations_are_kept() -> None:
    def kept(recompute: Recompute) -> int:
        sizes: list[int] = []
        spec, groups = tiny_spec(num_layers=4), ProcessGroups.single()
        model = Transformer(spec, groups, None, recompute)
        initialize_parameters(model.named_parameters(), spec, groups, 4)
        own = {p.data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(2, 8, dtype=torch.int64))
        return sum(sizes)

    none, selective, full, pairs = (
        kept(r) for r in (Recompute(), Recompute("selective"), Recompute("full"), Recompute("full", 2))
    )
    assert none > selective > full > pairs


@pytest.mark.parametrize(("size", "expected"), [(1, "a[1][1][1]bc"), (2, "a[2][1]bc"), (3, "a[3]bc"), (9, "a[3]bc")])
def test_groups_keep_the_order_and_leave_other_layers_alone(size: int, expected: str) -> None:
    blocks = [nn.Linear(1, 1) for _ in range(3)]
    names = {id(blocks[0]): "x"}
    ends = {name: nn.Identity() for name in "abc"}
    layers = [ends["a"], *blocks, ends["b"], ends["c"]]
    names = {id(module): name for name, module in ends.items()}
    result = grouped(layers, lambda layer: isinstance(layer, nn.Linear), Recompute("full", size), None)
    shown = "".join(f"[{len(x.blocks)}]" if isinstance(x, RecomputedGroup) else names[id(x)] for x in result)
    assert shown == expected
    flat = [block for x in result if isinstance(x, RecomputedGroup) for block in x.blocks]
    assert flat == blocks


def test_other_modes_leave_the_list_as_it_is() -> None:
    layers = [nn.Identity(), nn.Linear(1, 1)]
    assert grouped(layers, lambda layer: True, Recompute("selective"), None) == layers
