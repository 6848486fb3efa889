"""A checkpoint of a model under muP, read as the plain model that computes the same.

The multipliers of the function go into weights: attention's into the queries, the embeddings' into the embeddings, the
output's into the head, which a tied one is parted from. Invariant: the product is rounded once; what no weight can
hold is refused.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader, ForeignReader
from megatron.model.build import HEAD, POSITION_EMBEDDING, WORD_EMBEDDING
from megatron.model.spec import ModelSpec


def folded(reader: AnyReader) -> AnyReader:
    """The reader itself without muP, else one of the plain model.

    Raises: CheckpointError where positions that are no weights are multiplied.
    """
    spec = ModelSpec.from_dict(reader.state["model_spec"])
    if spec.mup is None:
        return reader
    if spec.position == "sinusoidal" and spec.position_scale != 1.0:
        raise CheckpointError(
            f"{reader.folder}: mup_rp_embedding_mult = {spec.position_scale:g} multiplies sinusoidal positions, which "
            "are no weights: no other format can express this model."
        )
    # The plain keys know one scale of the embeddings besides none.
    usual_scale = 1.0 if spec.embedding_scale == 1.0 else math.sqrt(spec.hidden_size)
    input_factor = spec.input_scale / usual_scale
    is_parted = spec.tied_head and spec.output_scale != input_factor
    plain = dataclasses.replace(spec, mup=None, embedding_scale=usual_scale, tied_head=spec.tied_head and not is_parted)

    def get(name: str) -> torch.Tensor:
        stored = reader.read(f"{WORD_EMBEDDING}.weight" if is_parted and name == f"{HEAD}.weight" else name)
        return _multiplied(name, stored.float(), spec, input_factor).to(stored.dtype)

    result = ForeignReader(reader.folder, plain, get, what="checkpoint without its multipliers", step=reader.step)
    result.state = {**reader.state, "model_spec": result.state["model_spec"]}
    return result


def _multiplied(name: str, weight: torch.Tensor, spec: ModelSpec, input_factor: float) -> torch.Tensor:
    assert spec.attention_scale is not None
    queries = spec.attention_scale * math.sqrt(spec.head_dim)
    module, _, own = name.rpartition(".")
    match module.rpartition(".")[2]:
        case "query_norm":
            # Of a layernorm the bias as well: scores are linear in what comes out of the norm.
            offset = 1.0 if spec.norm_offset and own == "weight" else 0.0
            return (weight + offset) * queries - offset
        case "query" if not spec.qk_norm:
            return weight * queries
        case "query_key_value" if not spec.qk_norm:
            rows = weight.clone().view(spec.num_heads, 3, spec.head_dim, *weight.shape[1:])
            rows[:, 0] *= queries
            return rows.view(weight.shape)
    if name == f"{WORD_EMBEDDING}.weight":
        return weight * input_factor
    if name == f"{POSITION_EMBEDDING}.weight":
        return weight * spec.position_scale
    if name == f"{HEAD}.weight":
        return weight * spec.output_scale
    return weight
