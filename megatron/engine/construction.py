"""Make this rank's part of the model, filled with its initial values, without ever holding more than it needs.

Parameters come into being in the dtype of training: no fp32 model stands on the device before DeepSpeed converts it.
Under ZeRO 3 they are divided one by one as they are filled, so that a model larger than the device can be made at all.
Invariant: the values are those of megatron.model.init, the same at every layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from megatron.engine.modules import LossModule, StagedModule, public_names
from megatron.engine.options import EngineOptions
from megatron.model.build import Transformer
from megatron.model.init import initialize_parameters
from megatron.model.recompute import Recompute
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.random_streams import RandomStream
from megatron.parallel.sharding import get_shard_spec, set_shard_spec

# Divides a parameter over the data-parallel ranks, in place.
Divide = Callable[[nn.Parameter], None]


def build_module(
    spec: ModelSpec,
    groups: ProcessGroups,
    stream: RandomStream,
    options: EngineOptions,
    device: torch.device,
    recompute: Recompute,
) -> LossModule | StagedModule:
    """The module that DeepSpeed trains, with parameters of `options.dtype` that hold nothing yet.

    Under ZeRO 3 they are on "meta"; `fill` allocates them. Raises ValueError for sizes that do not divide.
    """
    is_divided = options.zero_stage == 3
    with torch.device("meta" if is_divided else device), _default_dtype(options.dtype):
        if groups.topology.pp_size > 1:
            return StagedModule(spec, groups, stream, partition_method=options.partition_method, recompute=recompute)
        return LossModule(Transformer(spec, groups, stream, recompute))


def fill(
    module: LossModule | StagedModule,
    spec: ModelSpec,
    groups: ProcessGroups,
    *,
    seed: int,
    is_trained: Callable[[str], bool],
    divide: Divide | None = None,
    device: torch.device,
) -> None:
    """Give every parameter its initial value, and say whether it learns.

    divide: for a module on "meta"; each parameter is allocated on `device`, filled and divided before the next one is
    touched. Parallel: collective over the data-parallel ranks then.
    """
    for name, parameter in public_names(module):
        filled = parameter
        if divide is not None:
            assert isinstance(module, LossModule), "ZeRO 3 has no stages"
            empty = nn.Parameter(torch.empty_like(parameter, device=device))
            filled = set_shard_spec(empty, get_shard_spec(parameter))
            owner, _, leaf = name.rpartition(".")
            setattr(module.model.get_submodule(owner), leaf, filled)
        initialize_parameters([(name, filled)], spec, groups, seed)
        filled.requires_grad_(is_trained(name))
        if divide is not None:
            divide(filled)


def zero_3_division(config: dict[str, Any], dtype: torch.dtype, mpu: Any) -> Divide:
    """How DeepSpeed divides a parameter by this dictionary of its own. mpu: its grid, where there are several."""
    first: list[Any] = []

    def divide(parameter: nn.Parameter) -> None:
        if first:
            first[0].convert_to_zero_parameters(param_list=[parameter])
            return
        # DeepSpeed hangs on to the module; one parameter is enough for it to bring its methods to all others.
        deepspeed.zero.Init(
            module=nn.ParameterList([parameter]),
            data_parallel_group=mpu.get_data_parallel_group() if mpu is not None else None,
            config_dict_or_path=config,
            dtype=dtype,
            mpu=mpu,
        )
        first.append(parameter)

    return divide


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
