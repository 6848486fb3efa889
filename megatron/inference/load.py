"""A model for inference out of a checkpoint of any layout.

No optimizer is built and no gradient is kept. Invariant: only the bytes of this rank's shard are read (once the
checksums of the weights were compared).
"""

from __future__ import annotations

import torch
from torch import nn

from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader
from megatron.model.build import Transformer, build_model, vocabulary_parameters
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.sharding import get_shard_spec, set_shard_spec


def saved_spec(reader: AnyReader, tp_size: int = 1) -> ModelSpec:
    """The architecture that the checkpoint states, its vocabulary padded so that it divides over `tp_size` ranks.

    Raises: CheckpointError if it states none that this version knows.
    """
    try:
        values = dict(reader.state["model_spec"])
        rows = values["padded_vocab_size"]
        values["padded_vocab_size"] = rows if rows % tp_size == 0 else -(-values["vocab_size"] // tp_size) * tp_size
        return ModelSpec.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{reader.folder} states no model that this version knows: {error}") from error


def load_model(
    reader: AnyReader,
    groups: ProcessGroups | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The checkpoint's model in evaluation mode, weights in `dtype`.

    Parallel: pipeline stages are folded away; each tensor-parallel rank of `groups` reads its own shard.
    Raises: CheckpointError if a tensor is missing or the model does not divide over the ranks.
    """
    groups = groups or ProcessGroups.single()
    spec = saved_spec(reader, groups.tp_size)
    try:
        # On "meta" nothing is allocated: no moment at which a whole fp32 model stands beside the real one.
        model = build_model(spec, groups, device="meta")
    except ValueError as error:
        raise CheckpointError(f"{reader.folder}: {error}. Use another model_parallel_size.") from error
    padded = vocabulary_parameters(spec)
    for name, parameter in list(model.named_parameters()):
        rows = spec.padded_vocab_size if name in padded else None
        shard_spec = get_shard_spec(parameter)
        shard = reader.read_shard(
            name, "weight", groups.tp_rank, groups.tp_size,
            rows=rows, dtype=dtype, is_divided=shard_spec.dim is not None,
        )  # fmt: skip
        shape = shard_spec.shard_shape(groups.tp_size)
        if shard.numel() != parameter.numel():
            raise CheckpointError(
                f"{name} in {reader.folder} is {reader.spec(name).logical_shape}, the model's is {shape}"
            )
        owner, _, leaf = name.rpartition(".")
        loaded = nn.Parameter(shard.view(shape).to(device), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, set_shard_spec(loaded, shard_spec))
    return model.eval()
