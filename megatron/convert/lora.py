"""A checkpoint with low-rank updates, read as the plain model that computes the same.

Invariant: each weight comes out as W + (alpha / rank) B A, computed in fp32 and rounded once.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron.convert.foreign import AnyReader, ForeignReader
from megatron.model.lora import UPDATE
from megatron.model.spec import ModelSpec


def merged(reader: AnyReader) -> AnyReader:
    """The reader itself if there are no updates, else one of the plain model with the updates added to its weights."""
    spec = ModelSpec.from_dict(reader.state["model_spec"])
    if spec.lora is None:
        return reader
    scale, updated = spec.lora.alpha / spec.lora.rank, set(reader.names())

    def get(name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        weight = reader.read(name)
        if leaf != "weight" or f"{module}.{UPDATE}.a" not in updated:
            return weight
        a, b = (reader.read(f"{module}.{UPDATE}.{part}", dtype=torch.float32) for part in ("a", "b"))
        return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)

    what = "checkpoint with merged updates"
    plain = ForeignReader(reader.folder, dataclasses.replace(spec, lora=None), get, what=what, step=reader.step)
    plain.state = {**reader.state, "model_spec": plain.state["model_spec"]}
    return plain
